"""Published Wan folders to video, the whole way: text, rollout, VAE, file; on small random weights in each layout."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import wan_files
from beside import Beside
from made_runs import prepare
from refusals import refused

from hiar_model import load_transformer, load_video_model, save_transformer
from hiar_model.cli import main
from hiar_model.cli.generate import _own_steps
from hiar_model.cli.parallel import Job
from hiar_model.io.captions import CaptionedGrid
from hiar_model.io.video import Video, save_png, upscale
from hiar_model.models.vae import StreamingDecoder
from hiar_model.pipelines.compare import PANEL_SIDE
from hiar_model.pipelines.decode import Decoding

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here", "equal_mp4")]

PROMPT, NEXT = wan_files.PROMPT, "a blue square moving up"
HEIGHT, WIDTH = 16, 32
SIZE = {"height": HEIGHT, "width": WIDTH}
LARGER = 16  # small frames are enlarged to 256 pixels
FRAMES = 21  # 6 latent frames, two blocks


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Every published layout of the same weights."""
    root = tmp_path_factory.mktemp("wan")
    original = wan_files.write_original(root / "original")
    wan_files.write_original(root / "sharded", shards=3)
    wan_files.write_diffusers(root / "diffusers", shards=2)
    wan_files.write_training(root / "hiar.pt")
    wan_files.write_training(root / "wrapped.pt", {"generator": 0}, "model._fsdp_wrapped_module.{}".format)
    save_transformer(load_transformer(original), root / "ours.safetensors")
    wan_files.write_training(root / "other.pt", {"generator": 1})
    parts = root / "parts"  # text encoder and VAE alone
    parts.mkdir()
    for name in (wan_files.TEXT_ENCODER, wan_files.VAE, "google"):
        (parts / name).symlink_to(original / name)
    return root


@pytest.fixture(scope="module")
def model(files):
    return load_video_model(files / "original", "cpu")


@pytest.fixture(scope="module")
def encoded(model, equal_mp4, tmp_path_factory) -> bytes:
    """The file of the video, made in another order."""
    path = tmp_path_factory.mktemp("encoded") / "same.mp4"
    Video(whole(make(model, order="step_first")), 16).save(path)
    return path.read_bytes()


def command(*words, prompt: str | None = PROMPT, frames: int = FRAMES) -> int:
    size = ["--height", HEIGHT, "--width", WIDTH, "--num-frames", frames]
    return main([str(word) for word in ["generate", *([prompt] if prompt else []), *size, "--device", "cpu", *words]])


def make(model, prompt=PROMPT, **options) -> list[np.ndarray]:
    return list(prepare(prompt, model=model, **{**SIZE, "num_frames": FRAMES, "order": "stream", **options}))


def whole(blocks) -> np.ndarray:
    return np.concatenate(list(blocks))


def decoded(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# From each layout


LAYOUTS = {
    "original": ("original", None, "native layout: 2 layers of width 256"),
    "original, sharded": ("sharded", None, "00001-of-00003.safetensors and 2 more"),
    "diffusers": ("diffusers", None, "diffusers layout: 2 layers"),
    "training file, EMA": ("parts", "hiar.pt", r"training layout, network generator_ema \(left: generator, critic\)"),
    "training file behind wrappers": ("diffusers", "wrapped.pt", "training layout, network generator:"),
    "ours": ("parts", "ours.safetensors", "native layout"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_video(files, model, encoded, here, capsys, layout):
    folder, checkpoint, found = LAYOUTS[layout]
    weights = [] if checkpoint is None else ["--checkpoint", files / checkpoint]
    assert command("-o", "a.mp4", "--model", files / folder, *weights) == 0
    told = capsys.readouterr()
    assert re.search(found, told.err) and told.err.count("\n") == 1
    speed = r"[\d.]+ fps with the full VAE; [\d.]+ fps without decoding"
    assert re.fullmatch(rf"a\.mp4: 21 frames, 1\.3 s at 16 fps; made in [\d.]+ s \({speed}\)\n", told.out)
    seen = decoded("a.mp4")
    assert seen.shape == (FRAMES, LARGER * HEIGHT, LARGER * WIDTH, 3)
    record = json.loads((here / "a.mp4.json").read_text())
    assert record["weights_sha256"] == model.weights_sha256
    assert (record["height"], record["width"], record["fps"], len(record["rollout"]["steps"])) == (HEIGHT, WIDTH, 16, 4)
    assert seen.std() > 1 and (seen[0] != seen[-1]).any()
    assert (here / "a.mp4").read_bytes() == encoded, "other bits than from the first layout"


def test_other_weights_give_another_video(files, model):
    other = load_video_model(files / "parts", "cpu", checkpoint=files / "other.pt")
    assert other.weights_sha256 != model.weights_sha256
    assert (whole(make(other)) != whole(make(model))).any()


def test_what_a_wan_model_is_by_default(model):
    assert model.pixel_size == (480, 832) and model.num_frames == 81 and model.fps == 16
    assert (model.rollout.frames_per_block, model.rollout.window_frames, model.rollout.sink_frames) == (3, 21, 0)
    assert model.rollout.schedule.steps == (1000, 750, 500, 250) and model.rollout.schedule.shift == 5
    assert model.dtype == torch.bfloat16 and model.latent_frames(81) == 21  # the sparing dtype, on a CPU too


def test_the_record_repeats_the_video(files, here):
    options = ["--checkpoint", files / "hiar.pt", "--steps", 2, "--window-frames", "[6,9]", "--sink-frames", 1,
               "--kv-dtype", "float8_e4m3fn", "--offload", "text,vae", "--order", "stream"]  # fmt: skip
    assert command("-o", "first/", "--model", files / "parts", *options) == 0
    record = json.loads((here / "first/video.json").read_text())
    words = shlex.split(record["command"])
    assert main([*words[1:-1], "second/"]) == 0
    for image in (here / "first").glob("*.png"):
        assert image.read_bytes() == (here / "second" / image.name).read_bytes()


def test_blocks_come_before_the_end(model):
    run = prepare(PROMPT, model=model, order="stream", **SIZE, num_frames=33)
    done = [(len(frames), run.rollout.forwards_done) for frames in run]
    assert [frames for frames, _ in done] == [9, 12, 12]
    assert done[0][1] < done[1][1] < done[2][1] and done[0][1] == 4


def test_embeddings_of_prompts_are_kept(files, here, monkeypatch):
    arguments = ["-o", "a.mp4", "--model", files / "original", "--prompt-cache", "known"]
    assert command(*arguments, frames=9) == 0
    assert len(list((here / "known").iterdir())) == 1
    monkeypatch.setattr("hiar_model.models.text_encoder.load_umt5", None)  # would be called
    assert command(*arguments, "--overwrite", frames=9) == 0


# What a video goes on from


@pytest.fixture(scope="module")
def clip(model) -> np.ndarray:
    """A smooth one, uint8 [13, H, W, 3]."""
    x = torch.rand(1, 3, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    pixels = torch.nn.functional.interpolate(x, (13, HEIGHT, WIDTH), mode="trilinear", align_corners=True)
    return (pixels[0] * 255).round().byte().permute(1, 2, 3, 0).numpy()


def test_an_image_is_the_first_frame(model, clip, here):
    save_png(clip[0], "first.png")
    blocks = make(model, image="first.png", num_frames=25)
    assert [len(frames) for frames in blocks] == [1, 12, 12]
    assert np.array_equal(blocks[0][0], clip[0])
    save_png(clip[-1], "other.png")
    assert (whole(make(model, image="other.png", num_frames=25)[1:]) != whole(blocks[1:])).any()
    assert prepare(PROMPT, model=model, image="first.png", **SIZE).num_frames == 85


def test_images_over_time_and_a_last_frame(model, clip, here):
    """A block's first latent frame is that of a still picture: its four pixel frames stand still."""
    save_png(clip[0], "first.png")
    save_png(clip[-1], "other.png")
    plain = make(model, image="first.png", num_frames=25)
    story = make(model, image=["first.png", "other.png@13"], num_frames=25)
    assert all(np.array_equal(a, b) for a, b in zip(plain[:2], story[:2], strict=True))
    assert (plain[2] != story[2]).any()
    with refused(r"image other\.png@12: no block of the video begins at frame 12, nearest 1 or 13"):
        make(model, image=["first.png", "other.png@12"], num_frames=25)
    run = prepare(PROMPT, model=model, image="first.png", last_frame="other.png", **SIZE, num_frames=25)
    assert run.notes() == ["frames 1 to 24 are made at once, by infilling before the last frame"]
    still = run.frames[6]
    assert still.shape == (1, 16, HEIGHT // 8, WIDTH // 8)
    blocks = list(run._blocks())
    assert [block.first_frame for block in blocks] == [1, 4] and torch.equal(blocks[-1].latents[:, -1], still)
    assert prepare(PROMPT, model=model, image="first.png", last_frame="other.png", **SIZE).num_frames == 85


def test_what_is_given_is_what_the_network_and_the_decoder_see(model, clip, here):
    """The VAE's version of the clip, and of what follows, is that of all latents at once."""
    with av.open("clip.mkv", "w") as container:  # without loss
        stream = container.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "bgr0"
        for image in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    run = prepare(PROMPT, model=model, extend="clip.mkv", order="stream", **SIZE, num_frames=37)
    given, *made = list(run)
    assert np.array_equal(given, clip) and [len(frames) for frames in made] == [12, 12]
    assert run.prefix.shape == (1, 4, 16, HEIGHT // 8, WIDTH // 8)
    again = prepare(PROMPT, model=model, extend="clip.mkv", order="stream", **SIZE, num_frames=37)
    latents = torch.cat([run.prefix, *(block.latents for block in again.rollout)], 1)
    alone = StreamingDecoder(model.decoder().vae).decode(latents)
    assert np.array_equal(alone[13:], whole(made))


def test_the_image_on_the_command_line(files, clip, here, capsys):
    save_png(np.repeat(clip[0], 2, 0), "tall.png")
    assert command("-o", "a/", "--model", files / "original", "--image", "tall.png", frames=13) == 0
    told = capsys.readouterr()
    assert f"tall.png: scaled from {2 * HEIGHT}x{WIDTH} and cropped to {HEIGHT}x{WIDTH} (height x width)" in told.err
    assert "a: 13 frames, 0.8 s at 16 fps; 12 made in " in told.out
    record = json.loads((here / "a/video.json").read_text())
    assert record["given"] == "tall.png" and "--image ./tall.png" in record["command"]


def test_the_end_of_a_clip_is_taken(files, clip, here, capsys):
    Video(clip[:11], 24).save("clip.mp4", least_side=1)
    assert command("-o", "a/", "--model", files / "original", "--extend", "clip.mp4", frames=21) == 0
    told = capsys.readouterr().err
    assert "clip.mp4: the last 9 of 11 frames are used (1 + 4n)" in told
    assert "clip.mp4: recorded at 24 fps, shown at 16" in told


# Prompts, experts, sessions


def test_a_script_on_the_command_line(files, model, here, capsys):
    (here / "script.txt").write_text(f"0 {PROMPT}\n0.5 {NEXT}\n")
    arguments = ["-o", "a/", "--model", files / "original", "--prompts", "script.txt", "--order", "stream"]
    assert command(*arguments, "--on-prompt-change", "recache", prompt=None) == 0
    told = capsys.readouterr().err
    assert f"0.5 s {NEXT!r}: shows from 0.5625 s (block 1)" in told and "a new prompt shows at worst in block" in told
    assert "cache its context again" in told


def test_a_script_behind_an_image(model, clip, here):
    """Times count from the image: of blocks 1, 13, 25 ..., 0.7 s is in the second, which begins at frame 13."""
    from hiar_model import PromptSchedule

    save_png(clip[0], "first.png")
    script = PromptSchedule.of([(0, PROMPT), (0.7, NEXT)])
    run = prepare(None, model=model, image="first.png", prompts=script, order="stream", **SIZE, num_frames=25)
    assert run.notes()[1] == f"0.7 s {NEXT!r}: shows from 0.8125 s (block 2)"
    plain = make(model, image="first.png", num_frames=25)
    same = [np.array_equal(a, b) for a, b in zip(run, plain, strict=True)]
    assert same == [True, True, False]


def test_weights_by_step(files, model):
    high, low = files / "hiar.pt", files / "other.pt"
    experts = load_video_model(files / "parts", "cpu", checkpoint=f"0-1={high},2-3={low}")
    assert experts.experts[0] is experts.experts[1] is not experts.experts[2]
    found = whole(make(experts))
    assert (found != whole(make(model))).any()
    same = load_video_model(files / "parts", "cpu", checkpoint={"0-2": str(high), "3": str(high)})
    assert np.array_equal(whole(make(same)), whole(make(model)))
    own = load_video_model(files / "parts", "cpu", checkpoint=f"0-1={high},2-3={low}", own_steps=range(2, 4))
    assert own.experts[:2] == (None, None) and own.weights_sha256 == experts.weights_sha256


def test_a_rank_of_a_pipeline_loads_its_own_steps(monkeypatch):
    """Shared out before loading; two of three ranks, the last of which only decodes."""
    from jsonargparse import Namespace

    def own(rank: int, ranks: int = 2, **options):
        given = {"checkpoint": "0-1=a.pt,2-3=b.pt", "parallel": None, "steps_per_rank": "count", "steps": None}
        a = Namespace(**{**given, "dedicated_decoder_rank": False, **options})
        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
        return _own_steps(a, Job(ranks, None)), a.steps_per_rank

    assert own(0) == (range(2), [2, 2]) and own(1) == (range(2, 4), [2, 2])
    assert own(1, 3) == (range(1, 2), [1, 1, 2]) and own(2, 3, dedicated_decoder_rank=True) == (range(4, 4), [2, 2, 0])
    assert own(1, steps_per_rank=[1, 3]) == (range(1, 4), [1, 3])
    for all_of_them in ({"ranks": 1}, {"ranks": 9}, {"checkpoint": "a.pt"}, {"parallel": "ulysses"}):
        assert own(0, **all_of_them)[0] is None
    with pytest.raises(ValueError, match="--steps-per-rank must be such as .* with weights by step, got measured"):
        own(0, steps_per_rank="measured")


def test_a_session_goes_on_and_forks(files, model, here, capsys):
    arguments = ["--model", files / "original", "--order", "stream", "--window-frames", 6]
    assert command("-o", "all/", *arguments, "--session", "end.safetensors", frames=33) == 0
    assert command("-o", "one/", *arguments, "--session", "s.safetensors", frames=21) == 0
    assert command("-o", "two/", *arguments, "--from-session", "s.safetensors", frames=33) == 0
    assert command("-o", "fork/", *arguments, "--from-session", "s.safetensors", prompt=NEXT, frames=33) == 0
    capsys.readouterr()

    def images(*folders) -> list[bytes]:
        return [image.read_bytes() for name in folders for image in sorted((here / name).glob("*.png"))]

    assert len(images("two")) == 12 and images("one", "two") == images("all")
    assert images("fork") != images("two")
    assert command("-o", "a/", *arguments, "--from-session", "s.safetensors", frames=21) == 2
    assert "--num-frames must be more than the 21 of s.safetensors, got 21" in capsys.readouterr().err
    plain = whole(make(model, window_frames=6, num_frames=33)).astype(int)
    seen = np.stack([decoded(image)[0] for image in sorted((here / "all").glob("*.png"))])
    small = seen.reshape(33, HEIGHT, LARGER, WIDTH, LARGER, 3)[:, :, LARGER // 2, :, LARGER // 2].astype(int)
    assert np.abs(small - plain).mean() < 3, "a video with an open end is the same video"


def test_ctrl_c_keeps_a_session(files, here, capsys, monkeypatch):
    decode = StreamingDecoder.decode

    def interrupted(self, latents):
        if self.frames_done == 0:
            signal.raise_signal(signal.SIGINT)
        return decode(self, latents)

    arguments = ["--model", files / "original", "--order", "stream"]
    with monkeypatch.context() as patch:
        patch.setattr(StreamingDecoder, "decode", interrupted)
        assert command("-o", "a.mp4", *arguments, "--session", "s.safetensors", frames=33) == 130
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "hiar: interrupted; 9 frames are in a.mp4, resume with --from-session s.safetensors"
    assert len(decoded("a.mp4")) == 9
    assert command("-o", "b.mp4", *arguments, "--from-session", "s.safetensors", frames=33) == 0
    assert len(decoded("b.mp4")) == 24


def test_one_block_behind(model, here):
    """Frames of a decoder with a stream of its own come behind the next block; a session keeps those on the way."""
    behind = dataclasses.replace(model, new_decoder=lambda: Beside(model.decoder()))
    expected = make(model, num_frames=33)
    run = prepare(PROMPT, model=behind, order="stream", **SIZE, num_frames=33)
    frames = iter(run)
    first = next(frames)
    assert run.rollout.blocks_done == 2 and run.decoding.asynchronous and run.frames_done == 9
    run.save_session("s.safetensors")
    assert np.array_equal(whole([first, *frames]), whole(expected))
    rest = prepare(PROMPT, model=behind, order="stream", session="s.safetensors", **SIZE, num_frames=33)
    assert np.array_equal(whole([first, *rest]), whole(expected))


def test_decoding_at_once(model):
    decoding = Decoding(model.decoder())
    made = list(decoding.put(4, torch.zeros(1, 3, 16, HEIGHT // 8, WIDTH // 8)))
    assert [(block, frames.shape) for block, frames in made] == [(4, (9, HEIGHT, WIDTH, 3))]
    assert not list(decoding.flush()) and decoding.seconds > 0 and not decoding.asynchronous


def test_orders_side_by_side(model, files, here, capsys, monkeypatch):
    """hiar compare: no oracle here, so frame statistics; each panel has the frames of the model's own size."""
    composed = []
    compose = CaptionedGrid.compose
    monkeypatch.setattr(
        CaptionedGrid,
        "compose",
        lambda self, images, footer: (composed.append(images), compose(self, images, footer))[1],
    )
    words = ["compare", PROMPT, "-o", "a.mp4", "--model", str(files / "original"), "--device", "cpu"]
    words += ["--height", str(HEIGHT), "--width", str(WIDTH), "--num-frames", str(FRAMES)]
    assert main([*words, "--order", "[block_first,stream]"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"a.mp4: {FRAMES} frames, ")
    assert told[1].startswith("change of colours since the first block, %, ") and len(told) == 4
    record = json.loads((here / "a.mp4.json").read_text())
    assert [*record["orders"][0]["quality"]] == ["contrast", "colour_saturation", "sharpness", "change"]
    own = whole(make(model, order="stream"))
    assert len(composed) == FRAMES
    for image, (_, panel) in zip(own, composed, strict=True):
        assert np.array_equal(panel, upscale(image[None], PANEL_SIDE)[0])
