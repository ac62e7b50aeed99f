"""Pictures and clips that a video goes on from are taken as they look to people; what is written says its colours."""

from __future__ import annotations

import os
import struct
import weakref
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type
from av.stream import Disposition
from PIL import Image, ImageCms, ImageOps

from hiar_model.io.encoders import source_matrix
from hiar_model.io.video import Video
from hiar_model.pipelines import conditioning as module
from hiar_model.pipelines.conditioning import _orientation, read_conditioning

pytestmark = pytest.mark.cpu

SIZE = (48, 64)


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """Red left, blue right, brighter towards the top: no turn or mirror looks like another."""
    rows, columns = np.mgrid[:height, :width]
    red, blue = np.where(columns < width / 2, 255, 0), np.where(columns < width / 2, 0, 255)
    return (np.stack([red, 0 * red, blue], -1) * (1 - 0.7 * rows[..., None] / height)).astype(np.uint8)


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_as_its_exif_says(tmp_path, orientation):
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, 1)
    stored, turn = Image.fromarray(picture()), Image.Exif()
    turn[0x0112] = undo
    stored.info["exif"] = turn.tobytes()
    stored.getexif()[0x0112] = undo
    stored = ImageOps.exif_transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=exif)
    given = read_conditioning(tmp_path / "p.png", None, SIZE)
    assert given is not None
    assert np.array_equal(given.frames[0], picture())
    assert bool(given.notes) == (orientation > 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """Hidden under alpha 0 lie loud colours."""
    if mode == "P":
        image = Image.fromarray(np.kron([[0, 1], [1, 0]], np.ones((24, 32))).astype(np.uint8))
        image.putpalette([0, 255, 0, 200, 100, 50])
        image.save(tmp_path / "p.png", transparency=0)
    else:
        bands = np.zeros((*SIZE, len(mode)), np.uint8)
        bands[..., 0], bands[:24, 32:, -1], bands[24:, :32, -1] = 200, 255, 255
        Image.fromarray(bands, mode).save(tmp_path / "p.png")
    given = read_conditioning(tmp_path / "p.png", None, SIZE)
    assert given is not None
    assert given.frames[0][2, 2].tolist() == [255, 255, 255]
    assert given.frames[0][2, 60, 0] == 200
    assert "transparent parts are put on white" in given.notes[0]


def test_sixteen_bits_and_other_colour_spaces(tmp_path):
    grey = np.linspace(0, 65535, SIZE[1]).round().astype(np.uint16) * np.ones(SIZE, np.uint16)
    Image.fromarray(grey).save(tmp_path / "p.png")
    given = read_conditioning(tmp_path / "p.png", None, SIZE)
    assert given is not None
    assert np.abs(given.frames[0][..., 1] - grey / 257).max() <= 1
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "p.jpg", quality=98)
    given = read_conditioning(tmp_path / "p.jpg", None, SIZE)
    assert given is not None
    assert off(given.frames[0], picture()) < 4
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(picture()).save(tmp_path / "s.png", icc_profile=srgb)
    given = read_conditioning(tmp_path / "s.png", None, SIZE)
    assert given is not None
    assert np.abs(given.frames[0].astype(int) - picture()).max() <= 1
    Image.fromarray(picture()).save(tmp_path / "b.png", icc_profile=b"no profile")
    given = read_conditioning(tmp_path / "b.png", None, SIZE)
    assert given is not None
    assert "colour profile cannot be read" in given.notes[0]
    assert np.array_equal(given.frames[0], picture())


D50 = (0.9642, 1.0, 0.8249)
TO_XYZ = {  # columns: red, green, blue under D50, of the ICC's profiles
    "sRGB": [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]],
    "Display P3": [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]],
    "Adobe RGB": [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]],
}


def profile(space: str, gamma: float) -> bytes:
    """An ICC profile of version 2: primaries, or of "grey" none, and a gamma."""

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(65536 * x)) for x in numbers)

    grey, curve = space == "grey", b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(256 * gamma), 0)
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(82), b"cprt": b"text\0\0\0\0x\0\0\0",
            b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50)}  # fmt: skip
    for name, primary in zip("k" if grey else "rgb", [()] if grey else zip(*TO_XYZ[space], strict=True), strict=True):
        tags[f"{name}TRC".encode()] = curve
        if not grey:
            tags[f"{name}XYZ".encode()] = b"XYZ \0\0\0\0" + fixed(*primary)
    table, body = b"", b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    kind = b"\2\x10\0\0mntr" + (b"GRAY" if grey else b"RGB ") + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head = struct.pack(">I4x", 132 + len(table + body)) + kind + fixed(*D50) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("space", ["Display P3", "Adobe RGB", "grey"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "I;16"])
def test_the_colours_of_a_profile(tmp_path, space, mode):
    """In palettes, beside transparency, in 16 bits, and of grey pictures whose profile has colours."""
    gamma, grey = (1.0 if space == "grey" else 2.2), mode in ("L", "LA", "I;16")
    colour = np.array([100] * 3 if grey else [200, 100, 50])
    if mode == "I;16":
        drawn = Image.fromarray(np.full(SIZE, 100 * 257, np.uint16))
    else:
        plain = Image.new("L", SIZE, 100) if grey else Image.new("RGB", SIZE, tuple(colour.tolist()))
        drawn = plain.quantize(4) if mode == "P" else plain.convert(mode)
    drawn.save(tmp_path / "p.png", icc_profile=profile(space, gamma))
    given = read_conditioning(tmp_path / "p.png", None, drawn.size[::-1])
    assert given is not None
    if space == "grey" and not grey:
        expected, note = colour, "its colour profile is one of GRAY; read without it"
        assert note in given.notes[0]
    else:
        linear = (colour / 255) ** gamma
        if space != "grey":
            linear = np.linalg.solve(np.array(TO_XYZ["sRGB"]), np.array(TO_XYZ[space]) @ linear).clip(0, 1)
        expected = 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        assert not given.notes
    assert np.abs(given.frames[0, 2, 2] - expected).max() < 2


def test_one_grey_that_is_transparent_in_16_bits(tmp_path):
    grey = np.full(SIZE, 20000, np.uint16)
    grey[:, :8] = 40000
    Image.fromarray(grey).save(tmp_path / "p.png", transparency=40000)
    given = read_conditioning(tmp_path / "p.png", None, SIZE)
    assert given is not None and "transparent parts are put on white" in given.notes[0]
    assert given.frames[0, 2, 2].tolist() == [255] * 3 and given.frames[0, 2, 20].tolist() == [78] * 3


def test_a_photo_with_its_preview_in_one_file(tmp_path):
    """As phones write them (MPO); an animation is refused."""
    photo, other = Image.fromarray(picture()), Image.new("RGB", (20, 20))
    photo.save(tmp_path / "p.jpg", format="MPO", save_all=True, append_images=[other], quality=98)
    given = read_conditioning(tmp_path / "p.jpg", None, SIZE)
    assert given is not None and off(given.frames[0], picture()) < 4
    for name in ("a.webp", "a.png"):
        photo.save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", photo.size)])
        with pytest.raises(
            ValueError, match=rf"{name} holds 2 frames, expected one; for a clip write it as .mp4 and use extend$"
        ):
            read_conditioning(tmp_path / name, None, SIZE)
    photo.save(tmp_path / "a.gif")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("a.gif", "; for a clip use extend"), ("folder.png", "a folder, expected a file")):
        with pytest.raises(ValueError, match=rf"image .*{name}: .*{reason}$"):
            read_conditioning(tmp_path / name, None, SIZE)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_the_display_matrix_of_a_clip(turns, mirrored):
    """Against the definition: pixel (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[turns]
    if mirrored:
        a, c = -a, -c
    matrix = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], np.int64).astype(np.int32)
    frame = SimpleNamespace(side_data={Type.DISPLAYMATRIX: matrix.tobytes()})
    image = picture(4, 6)
    rows, columns = np.mgrid[:4, :6]
    x, y = a * columns + c * rows, b * columns + d * rows
    x, y = x - x.min(), y - y.min()
    shown = np.zeros((y.max() + 1, x.max() + 1, 3), np.uint8)
    shown[y, x] = image
    quarter, flip = _orientation(frame)
    found = np.rot90(image, quarter)
    assert np.array_equal(found[:, ::-1] if flip else found, shown)
    assert _orientation(SimpleNamespace(side_data={})) == (0, False)


def clip(
    path, frames: np.ndarray, aspect: Fraction | None = None, codec="libx264", pixels="yuv420p", tags=None, **options
) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options={"crf": "4"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for image in frames:
            form = "rgba" if image.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(image, format=form).reformat(format=pixels, **options)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("a", "b"), [(0, 1), (-1, 0), (0, -1)], ids=["90", "180", "270"])
def test_a_clip_stands_as_its_file_says(tmp_path, a, b):
    """A phone held upright writes frames that lie, and a matrix in the track's header."""
    clip(tmp_path / "c.mp4", np.stack([picture()] * 5))
    data = bytearray((tmp_path / "c.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "c.mp4").write_bytes(data)
    shown = np.rot90(picture(), {(0, 1): -1, (-1, 0): 2, (0, -1): 1}[a, b])
    conditioning = read_conditioning(None, tmp_path / "c.mp4", shown.shape[:2])
    assert conditioning is not None and conditioning.notes == (f"{tmp_path / 'c.mp4'}: rotated as the file says",)
    assert off(conditioning.frames[2], shown) < 4


def test_pixels_that_are_not_square(tmp_path):
    """32 columns of pixels twice as wide as high look like 64."""
    narrow = np.stack([picture()[:, ::2]] * 5)
    clip(tmp_path / "c.mp4", narrow, Fraction(2, 1))
    conditioning = read_conditioning(None, tmp_path / "c.mp4", SIZE)
    assert conditioning is not None
    assert conditioning.frames.shape == (5, *SIZE, 3)
    assert off(conditioning.frames[2], picture()) < 6
    assert "2 times as wide as high" in conditioning.notes[-1]


TRANSPARENT = {
    "c.mov": ("qtrle", "argb"), "c.mkv": ("ffv1", "yuva420p"), "c.webm": ("libvpx-vp9", "yuva420p"),
    "c8.webm": ("libvpx", "yuva420p"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*TRANSPARENT, "c.gif"])
def test_what_is_transparent_in_a_clip_is_white(tmp_path, monkeypatch, name):
    """As in a picture: a loud green lies under alpha 0."""
    cut_out = np.zeros((*SIZE, 4), np.uint8)
    cut_out[..., 1], cut_out[:, 32:] = 255, (200, 100, 50, 255)
    if name == "c.gif":
        images = [Image.new("P", SIZE[::-1], 1 + i % 2) for i in range(5)]
        for image in images:
            image.putpalette([0, 255, 0, 200, 100, 50, 200, 100, 54])
            image.paste(0, (0, 0, 32, 48))
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], transparency=0, disposal=2)
    else:
        with av.open(str(tmp_path / name), "w") as container:
            codec, pixels = TRANSPARENT[name]
            options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}  # it cannot have both
            stream = container.add_stream(codec, rate=16, options=options)
            stream.height, stream.width, stream.pix_fmt = *SIZE, pixels
            frame = av.VideoFrame.from_ndarray(cut_out, format="rgba")
            for _ in range(5):
                container.mux(stream.encode(frame.reformat(format=pixels)))
            container.mux(stream.encode())
    conditioning = read_conditioning(None, tmp_path / name, SIZE)
    assert conditioning is not None and conditioning.frames.shape == (5, *SIZE, 3)
    assert conditioning.notes == (f"{tmp_path / name}: transparent parts are put on white",)
    assert conditioning.frames[4, 9, 9].tolist() == [255] * 3
    assert np.abs(conditioning.frames[4, 40, 60].astype(int) - (200, 100, 50)).max() <= 4
    if name.endswith(".webm"):
        monkeypatch.setattr(av, "codecs_available", set())
        conditioning = read_conditioning(None, tmp_path / name, SIZE)
        assert conditioning is not None and "transparent parts are not read as such" in conditioning.notes[0]


@pytest.mark.parametrize(("curve", "name"), [(16, "PQ"), (18, "HLG"), (1, None)])
def test_a_clip_of_high_dynamic_range_is_said_to_be_paler(tmp_path, curve, name):
    clip(tmp_path / "c.mp4", np.stack([picture()] * 3), tags={"color_trc": curve, "color_primaries": 9})
    conditioning = read_conditioning(None, tmp_path / "c.mp4", SIZE)
    assert conditioning is not None
    assert [f"dynamic range ({name})" in note for note in conditioning.notes] == ([True] if name else [])


def test_the_cover_of_a_song_is_no_video(tmp_path):
    with av.open(str(tmp_path / "c.mp4"), "w") as container:
        cover, sound = container.add_stream("mjpeg", rate=16), container.add_stream("aac", rate=44100)
        cover.disposition = Disposition.attached_pic
        cover.height, cover.width, cover.pix_fmt = *SIZE, "yuvj420p"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux([*cover.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")), *cover.encode()])
        container.mux([*sound.encode(frame), *sound.encode()])
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(ValueError, match=r"c\.mp4: has no video stream$"):
        read_conditioning(None, tmp_path / "c.mp4", SIZE)


def test_a_pipe_is_no_clip(tmp_path):
    os.mkfifo(tmp_path / "c.mp4")
    with pytest.raises(ValueError, match=r"^extend .*c\.mp4: a device, a pipe or a socket, no file$"):
        read_conditioning(None, tmp_path / "c.mp4", SIZE)


@pytest.mark.parametrize(("lines", "matrix"), [(720, "ITU709"), (480, "ITU601")])
def test_a_clip_that_does_not_say_its_matrix_is_read_by_its_size(tmp_path, lines, matrix):
    colour = np.array([200, 40, 40], np.uint8)
    clip(tmp_path / "c.mp4", np.broadcast_to(colour, (3, lines, 64, 3)).copy(), dst_colorspace=matrix)
    given = read_conditioning(None, tmp_path / "c.mp4", (lines, 64))
    assert given is not None
    assert np.abs(given.frames[1, 9, 9].astype(int) - colour).max() <= 3
    for unsaid in (0, 2):  # 0 is that of RGB, but stands in some files of YUV
        frame = SimpleNamespace(colorspace=unsaid, format=SimpleNamespace(is_rgb=False), planes="yuv", height=lines)
        assert source_matrix(frame) == matrix


@pytest.mark.parametrize(("height", "tag", "matrix"), [(720, 1, "ITU709"), (480, 6, "ITU601")])
def test_an_mp4_says_its_colours(tmp_path, height, tag, matrix):
    colour = np.array([200, 40, 40], np.uint8)
    video = Video(np.broadcast_to(colour, (3, height, 640, 3)).copy(), 16.0)
    with av.open(str(video.save(tmp_path / "v.mp4"))) as container:
        frame = next(container.decode(video=0))
        said = container.streams.video[0].codec_context
        assert (said.colorspace, said.color_primaries, said.color_trc, said.color_range) == (tag, tag, tag, 1)
        shown = frame.to_ndarray(format="rgb24", src_colorspace=matrix)[100, 100]
    assert np.abs(shown.astype(int) - colour).max() <= 3
    given = read_conditioning(None, tmp_path / "v.mp4", (height, 640))
    assert given is not None
    assert np.abs(given.frames[0, 9, 9].astype(int) - colour).max() <= 3


@pytest.mark.parametrize("lines", [720, 48], ids=["BT.709", "BT.601"])
def test_a_clip_that_goes_on_from_a_clip_is_no_darker(tmp_path, lines):
    """Colours after six files, each of the frames of the one before: PyAV's defaults take 6 of 255."""
    colours = np.random.default_rng(0).integers(0, 256, (5, 3), dtype=np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (5, lines, 32, 3))
    for _ in range(6):
        conditioning = read_conditioning(None, Video(frames, 16.0).save(tmp_path / "v.mp4", least_side=1), (lines, 32))
        assert conditioning is not None
        frames = conditioning.frames
    drift = frames[:, lines // 2, 16].astype(int) - colours
    assert np.abs(drift.mean(0)).max() < 1 and np.abs(drift).max() <= 2


@pytest.mark.parametrize(("limit", "at_once"), [(1 << 26, 17), (1, 3)], ids=["small frames", "large frames"])
def test_a_large_clip_takes_the_memory_of_its_small_frames(tmp_path, monkeypatch, limit, at_once):
    """Of the file's size a few frames are there at a time: two handfuls of small ones, of large ones fewer."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", limit)
    clip(tmp_path / "c.mp4", np.stack([np.kron(picture(), np.ones((4, 4, 1), np.uint8))] * 40))
    alive, most = [], 0
    upright = module._Clip._upright

    def watched(self, *args):
        nonlocal most
        image = upright(self, *args)
        alive.append(weakref.ref(image))
        most = max(most, sum(x() is not None for x in alive))
        return image

    monkeypatch.setattr(module._Clip, "_upright", watched)
    found = read_conditioning(None, tmp_path / "c.mp4", SIZE, step=4)
    assert found is not None
    assert found.frames.shape == (37, *SIZE, 3)
    assert 1 < most <= at_once


CONTAINERS = {"mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("damage", ["cut short", "a hole"])
def test_a_clip_that_is_not_whole_is_refused(tmp_path, kind, damage):
    """It was taken as far as it could be read: the video would have gone on from the wrong place."""
    whole, noise = tmp_path / f"whole.{kind}", np.random.default_rng(0)
    with av.open(str(whole), "w") as container:
        stream = container.add_stream(CONTAINERS[kind], rate=16)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for _ in range(24):
            image = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert len(read_conditioning(None, whole, SIZE, 1).frames) == 24
    data, broken = bytearray(whole.read_bytes()), tmp_path / f"broken.{kind}"
    middle = len(data) // 2
    broken.write_bytes(
        data[: middle + 40] if damage == "cut short" else data[:middle] + bytes(1500) + data[middle + 1500 :]
    )
    with pytest.raises(ValueError, match=r"cut short: its frames end at|damaged at its frame \d+|corrupt"):
        read_conditioning(None, broken, SIZE, 1)


def test_a_picture_of_too_many_pixels_is_named_so(tmp_path, recwarn, monkeypatch):
    assert 2 * Image.MAX_IMAGE_PIXELS // 10**6 == 178
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**4)  # pictures of the true size take seconds
    Image.new("1", (150, 150)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"more pixels than are read \(178 million\): scale it down"):
        read_conditioning(tmp_path / "a.png", None, SIZE)
    Image.new("1", (120, 120)).save(tmp_path / "b.png")  # Pillow warns of an attack
    read_conditioning(tmp_path / "b.png", None, SIZE)
    # not whatever an object of another test says as it goes
    warned = [warning for warning in recwarn.list if issubclass(warning.category, Image.DecompressionBombWarning)]
    assert not warned


def test_damage_inside_a_png_is_refused(tmp_path):
    """Its checksums were not looked at."""
    file = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(file)
    data = bytearray(file.read_bytes())
    assert read_conditioning(file, None, SIZE) is not None
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"image .*a\.png: corrupt, or not the format of its suffix: broken"):
        read_conditioning(file, None, SIZE)


KINDS = {
    "baseline": {}, "progressive": {"progressive": True}, "444": {"subsampling": 0}, "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"}, "restarts": {"restart_marker_blocks": 4}, "tables": {"optimize": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damage_inside_a_photo_is_said(tmp_path, kind):
    """Pillow shows what it can of it, and says nothing. Bytes behind the end are no damage."""
    options = dict(KINDS[kind])
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    file = tmp_path / "a.jpg"
    Image.fromarray(noise).convert(options.pop("mode", "RGB")).save(file, **options)
    data = file.read_bytes()
    file.write_bytes(data + b"more")
    assert not [note for note in read_conditioning(file, None, SIZE).notes if "damaged" in note]
    if kind != "progressive":
        return  # of other kinds most damage looks like another picture
    middle = len(data) // 2
    file.write_bytes(data[:middle] + bytes(reversed(data[middle : middle + 64])) + data[middle + 64 :])
    damage = [note for note in read_conditioning(file, None, SIZE).notes if "damaged" in note]
    assert damage == [f"{file}: damaged inside, parts of it are wrong: look at it, or get it again"]
