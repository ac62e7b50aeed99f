"""Writing videos: what is on disk is what was given, whole or not at all."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from altered import altered
from refusals import refused

from hiar_model import load_video_model
from hiar_model.io import atomic, files
from hiar_model.io.files import check_folder
from hiar_model.io.video import (
    Video,
    VideoWriter,
    check_fps,
    check_target,
    contact_sheet,
    encode_png,
    save_png,
    upscale,
)

pytestmark = pytest.mark.cpu


def clip(frames: int = 8, height: int = 32, width: int = 32) -> np.ndarray:
    """A soft disc that moves right over a dark ground."""
    y, x = np.mgrid[:height, :width]
    images = []
    for i in range(frames):
        cover = np.clip(5.5 - np.hypot(x - 8 - i, y - height / 2), 0, 1)[..., None]
        images.append(cover * (230, 30, 36) + (1 - cover) * (20, 23, 36))
    return np.stack(images).round().astype(np.uint8)


def decode(source) -> np.ndarray:
    with av.open(source) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def png_folder(path) -> np.ndarray:
    return np.concatenate([decode(str(file)) for file in sorted(path.glob("*.png"))])


def read(path) -> np.ndarray:
    return png_folder(path) if path.is_dir() else decode(str(path))


def test_a_video_in_a_notebook(tmp_path):
    """One line as text, however large it is and long its prompt; as HTML the video itself."""
    video = Video(clip(18, 32, 48), 12.0, {"prompt": "a <b>disc</b> " + "rolls on and on " * 20})
    line = repr(video)
    assert line.startswith("Video(18 frames of 48x32, 12 fps, 1.5 s, 'a <b>disc</b> rolls") and line.endswith("...')")
    assert "\n" not in line and len(line) < 130
    assert repr(Video(clip(1), 23.976)) == "Video(1 frames of 32x32, 23.976 fps, 0.0 s)"
    page = video._repr_html_()
    file = tmp_path / "shown.mp4"
    file.write_bytes(base64.b64decode(page.partition("base64,")[2].partition('"')[0]))
    assert len(read(file)) == 18
    assert "&lt;b&gt;disc" in page and "<b>" not in page


def test_a_model_is_shown_in_one_line():
    shown = repr(load_video_model("toy", "cpu"))
    assert shown == "VideoModel('toy', frames of 32x32 pixels, float32 on cpu)"


@pytest.mark.parametrize(
    ("name", "worst", "mean"), [("a.mp4", 60, 3), ("a.MP4", 60, 3), ("a.gif", 12, 0.5), ("a", 0, 0)]
)
def test_what_is_written_is_what_was_given(tmp_path, name, worst, mean):
    frames = clip()
    path = Video(frames, 12, {"prompt": "a disc"}).save(tmp_path / name)
    error = np.abs(read(path).astype(int) - upscale(frames))
    assert error.shape == (8, 256, 256, 3)
    assert error.max() <= worst and error.mean() <= mean
    record = tmp_path / "a/video.json" if name == "a" else tmp_path / f"{name}.json"
    content = json.loads(record.read_text())
    assert content == {"file": name, "frames": 8, "fps": 12.0, "prompt": "a disc"}
    assert len(list(tmp_path.iterdir())) == (1 if name == "a" else 2), "something temporary is left"


@pytest.mark.parametrize(
    ("name", "fps"), [("a.mp4", 12), ("a.mp4", 23.976), ("a.mp4", 0.5), ("a.gif", 12), ("a.gif", 30)]
)
def test_pace(tmp_path, name, fps):
    path = Video(clip(12), fps).save(tmp_path / name, least_side=1)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
    assert len(times) == 12
    assert times[-1] - times[0] == pytest.approx(11 / fps, abs=0.0101)


def test_mp4_is_what_browsers_play(tmp_path):
    path = Video(clip(3, 33, 47), 12).save(tmp_path / "odd.mp4", least_side=1)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.height, context.width) == ("h264", "yuv420p", 34, 48)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "a browser would wait for the whole file"
    assert b" subme=7 " in data, "x264 takes its time for frames that were not enlarged"


def test_gif_loops(tmp_path):
    assert b"NETSCAPE2.0\x03\x01\x00\x00" in Video(clip(3), 12).save(tmp_path / "a.gif").read_bytes()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_what_a_link_names_is_written(tmp_path, name, there):
    """The link stays, and the record lies beside it, under the name that was typed."""
    link, file = tmp_path / name, tmp_path / "disk" / f"file{Path(name).suffix}"
    file.parent.mkdir()
    link.symlink_to(file)
    if there:
        file.write_bytes(b"old") if file.suffix else file.mkdir()
    Video(clip(3), 12).save(link)
    assert link.is_symlink() and len(read(file)) == 3
    names = {"frame_00000.png", "frame_00001.png", "frame_00002.png", "video.json"} if file.is_dir() else {file.name}
    assert {p.name for p in file.parent.rglob("*") if p.is_file()} == names
    assert {p.name for p in tmp_path.iterdir()} == {"disk", name, *([f"{name}.json"] if file.suffix else [])}


def test_frame_by_frame_is_the_same(tmp_path):
    frames = clip()
    with VideoWriter(tmp_path / "parts.mp4", 12) as writer:
        for first in range(0, 8, 3):
            writer.write(frames[first : first + 3])
    whole = Video(frames, 12).save(tmp_path / "whole.mp4")
    assert writer.frames_written == 8
    assert writer.path.read_bytes() == whole.read_bytes()


def test_command_of_the_record_names_the_file(tmp_path):
    path = Video(clip(1), 12, {"command": ["hiar", "generate", "a disc"]}).save(str(tmp_path / "dir") + "/")
    assert json.loads((path / "video.json").read_text())["command"] == "hiar generate 'a disc' --out dir/"


def test_targets(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.mp4", "a.GIF", "new", "new.mp4/", "empty", "empty/", ".hidden.gif"):
        assert check_target(f"{tmp_path}/{name}").parent == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["empty"], "asking writes nothing"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.avi", r"unknown suffix '\.avi'; legal: name\.mp4, name\.gif, or name/"),
        ("missing/a.mp4", "missing is no folder; make it first"),
        ("file.txt/a.mp4", "file.txt is no folder; make it first"),
        ("full", "exists and is no empty folder"),
        ("full/", "exists and is no empty folder"),
        ("file/", "exists and is no empty folder"),
        ("folder.mp4", "is a folder"),
        ("recorded.mp4", "is a folder"),
        ("link", "exists and is no empty folder"),
        ("loop", "Too many levels of symbolic links"),
        ("loop.mp4", "Too many levels of symbolic links"),
        ("turning.mp4", "Too many levels of symbolic links"),
        ("lost.mp4", "missing is no folder; make it first"),
        ("pipe.mp4", "it is a device, a pipe or a socket"),
        ("n" * 300 + ".mp4", "File name too long"),
    ],
)
def test_illegal_targets(tmp_path, name, message):
    for folder in ("full", "folder.mp4", "recorded.mp4.json"):
        (tmp_path / folder).mkdir()
    for file in ("file", "file.txt", "full/x"):
        (tmp_path / file).write_text("kept")
    (tmp_path / "link").symlink_to("full")
    for loop in ("loop", "loop.mp4", "turning.mp4.json"):
        (tmp_path / loop).symlink_to(loop)
    (tmp_path / "lost.mp4").symlink_to("missing/a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    before = sorted(tmp_path.rglob("*"))
    for ask in (check_target, Video(clip(1), 12).save):
        with refused(message):
            ask(f"{tmp_path}/{name}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["~/a.mp4", "~/a", "s3://bucket/a.mp4"])
def test_what_is_on_no_disk(here, name):
    with pytest.raises(ValueError, match=f"^cannot write {name}: (only a shell replaces ~, give /|a URL)"):
        Video(clip(1), 16).save(name)
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", ["", "/", ".", "-", ".mp4", "folder/.gif"])
def test_no_name(name):
    with pytest.raises(ValueError, match="is not a file name"):
        check_target(name)


def test_unwritable_folder(tmp_path, monkeypatch):
    def refuse(*_, **__):  # root may write everywhere, so no mode bits
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "tempfile", altered(tempfile, TemporaryFile=refuse))
    with pytest.raises(ValueError, match=r"cannot write .*a\.mp4: Permission denied$"):
        check_target(tmp_path / "a.mp4")


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
def test_a_process_that_ends_while_it_looks_leaves_nothing(tmp_path, monkeypatch):
    names = []

    def look(**options):
        file = tempfile.TemporaryFile(**options)  # noqa: SIM115 (the caller closes it)
        names.append(list(tmp_path.iterdir()))
        return file

    monkeypatch.setattr(files, "tempfile", altered(tempfile, TemporaryFile=look))
    check_target(tmp_path / "a.mp4")
    check_folder(tmp_path / "new" / "run")
    assert names == [[], []]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
@pytest.mark.parametrize("event", ["error", "interrupt", "full disk", "nothing written"])
def test_a_failure_leaves_nothing(tmp_path, name, event, monkeypatch):
    if name != "a":
        (tmp_path / name).write_bytes(b"old")
        (tmp_path / f"{name}.json").write_text("{}")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    expected = {"interrupt": KeyboardInterrupt, "full disk": OSError}.get(event, ValueError)
    with pytest.raises(expected), VideoWriter(tmp_path / name, 12) as writer:
        if event != "nothing written":
            writer.write(clip(80, 16, 16))  # more than the encoder holds back
            assert any(".partial" in p.name for p in tmp_path.iterdir()) or name == "a.gif"
        if event == "interrupt":
            signal.raise_signal(signal.SIGINT)
        if event == "full disk":
            monkeypatch.setattr(atomic, "os", altered(os, replace=_full))
        if event == "error":
            writer.write(clip(2, 16, 18))  # another size
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def _full(*_):
    raise OSError(28, "No space left on device")


def test_an_old_file_is_replaced(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"old")
    (tmp_path / "empty").mkdir()
    assert len(read(Video(clip(4), 12).save(tmp_path / "a.gif"))) == 4
    assert len(read(Video(clip(4), 12).save(tmp_path / "empty"))) == 4


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), "12", None, True, 1e-9, 1e6])
def test_illegal_fps(fps, tmp_path):
    with pytest.raises(ValueError, match="fps must be a number from 0.01 to 1000"):
        check_fps(fps)
    with pytest.raises(ValueError, match="fps must be a number from 0.01 to 1000"):
        Video(clip(1), fps)


def test_gif_has_a_limit(tmp_path):
    with pytest.raises(ValueError, match=r"at most 50 fps, got 60"):
        VideoWriter(tmp_path / "a.gif", 60)


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_illegal_frames(frames):
    with pytest.raises(ValueError, match="frames must be uint8"):
        Video(frames, 12)


def test_upscale_is_bicubic():
    """As torch interpolates, up to the rounding of a half."""
    frames = clip(3, 20, 31)
    planes = torch.from_numpy(frames).movedim(3, 1).double()
    expected = torch.nn.functional.interpolate(planes, scale_factor=13, mode="bicubic", align_corners=False)
    off = expected.clamp(0, 255).movedim(1, 3).numpy() - upscale(frames)
    assert np.abs(off).max() < 0.5001


def test_upscale():
    frames = clip(2, 32, 48)
    large = upscale(frames)
    assert large.shape == (2, 256, 384, 3)
    assert np.abs(large.reshape(2, 32, 8, 48, 8, 3).mean((2, 4)) - frames).mean() < 2, "moved or recoloured"
    assert len(np.unique(large[0, :, :, 0])) > len(np.unique(frames[0, :, :, 0])), "edges are steps"
    assert upscale(large) is large
    assert upscale(frames, 1) is frames
    assert upscale(clip(1, 100, 200), 101).shape == (1, 200, 400, 3), "by a whole factor"


def test_contact_sheet(tmp_path):
    frames = clip(5)
    sheet = contact_sheet(frames, 3, gap=1)
    assert sheet.shape == (67, 100, 3)
    assert (sheet[1:33, 1:33] == frames[0]).all() and (sheet[34:66, 34:66] == frames[4]).all()
    assert (sheet[34:66, 67:99] == 255).all() and (sheet[0] == 255).all()
    assert (contact_sheet(iter(frames), 3, gap=1) == sheet).all()
    save_png(sheet, tmp_path / "sheet.png")
    assert (decode(str(tmp_path / "sheet.png"))[0] == sheet).all()
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="columns must be at least 1"):
        contact_sheet(frames, 0)


def test_png_is_lossless():
    image = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    assert (decode(io.BytesIO(encode_png(image)))[0] == image).all()


@pytest.mark.parametrize("fps", [0.01, 1000])
def test_the_rates_at_the_ends_can_be_read_back(tmp_path, fps):
    """Beyond them an .mp4 played at 24 fps, or held no frame that could be read."""
    with av.open(str(Video(clip(3), fps).save(tmp_path / "a.mp4"))) as container:
        assert float(container.streams.video[0].average_rate) == fps
        assert len(list(container.decode(video=0))) == 3


@pytest.mark.parametrize("fps", [0.5, 4, 25])
def test_the_last_frame_of_a_gif_stays_as_long_as_the_others(tmp_path, fps):
    """It stayed for a hundredth of a second."""
    with av.open(str(Video(clip(5), fps).save(tmp_path / "a.gif"))) as container:
        assert container.duration / 1e6 == pytest.approx(5 / fps, abs=0.011)


def test_what_a_format_cannot_hold_is_told_before_the_first_frame(tmp_path):
    long = (16, 20000)
    with pytest.raises(ValueError, match=r"a .mp4 has at most 16384 pixels a side, got 16x20000; use a folder of PNG"):
        VideoWriter(tmp_path / "a.mp4", 16, size=long)
    with pytest.raises(ValueError, match=r"a .gif has at most 65535 pixels a side, got 16x70000"):
        VideoWriter(tmp_path / "a.gif", 16, size=(16, 70000))
    VideoWriter(tmp_path / "a", 16, size=long)
    with pytest.raises(ValueError, match="metadata of .* cannot be written as JSON: .* is no JSON"):
        VideoWriter(tmp_path / "a.mp4", 16, {"x": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_numpy_and_paths(tmp_path):
    Video(clip(1), 16, {"rate": np.float32(0.5), "count": np.int64(3), "file": tmp_path}).save(tmp_path / "a.gif")
    record = json.loads((tmp_path / "a.gif.json").read_text())
    assert (record["rate"], record["count"], record["file"]) == (0.5, 3, str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), np.ones(3), torch.ones(3), object()], ids=type)
def test_metadata_that_no_json_can_hold(tmp_path, value):
    """NaN made a record that browsers and jq refuse, a tensor an error from inside."""
    with pytest.raises(ValueError, match=r"^metadata of .*v\.mp4 cannot be written as JSON: "):
        Video(clip(2), 12, {"score": value}).save(tmp_path / "v.mp4")
    assert not list(tmp_path.iterdir())


def test_a_narrow_band_is_enlarged_within_bounds():
    assert upscale(np.zeros((1, 2, 5000, 3), np.uint8)).shape == (1, 2, 5000, 3)
    assert upscale(np.zeros((1, 2, 1000, 3), np.uint8)).shape == (1, 8, 4000, 3)


def test_frames_that_are_no_array():
    for wrong in (clip(1).tolist(), torch.from_numpy(clip(1))):
        with pytest.raises(ValueError, match="frames must be a numpy array, uint8"):
            Video(wrong, 16)


@pytest.mark.parametrize("path", [None, 3, b"a.mp4"])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match="^path must be the path of a file or folder, got "):
        Video(clip(1), 16).save(path)


@pytest.mark.parametrize("metadata", [None, "text", [1]])
def test_metadata_that_is_no_mapping(metadata):
    with pytest.raises(ValueError, match="^metadata must be a mapping, got "):
        Video(clip(1), 16, metadata)
