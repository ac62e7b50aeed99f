"""Models on disk and prompt to video, on a small model of random weights."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
from made_runs import prepare
from refusals import refused
from small_toy import BLOCK, FRAMES, PROMPT, SIDE, WINDOW, small_folder, small_model  # noqa: F401 (fixtures)

import hiar_model
from hiar_model import FlowSchedule, RolloutConfig, generate, load_video_model, stream
from hiar_model.io.video import Video, save_png
from hiar_model.models.registry import CONFIG, WEIGHTS, save_toy_model
from hiar_model.toy.codec import ToyCodec

pytestmark = pytest.mark.cpu


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder, to be damaged."""
    for name in (WEIGHTS, CONFIG):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


# Models on disk


def test_what_is_saved_is_what_is_loaded(folder, model):
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "something temporary is left"
    assert model.weights_sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    assert {name.partition(".")[0] for name in tensors} == {"transformer", "codec"}
    assert tensors["transformer.blocks.0.self_attn.q.weight"].dtype == torch.float16
    state = model.transformer.state_dict()
    assert len(state) == len([name for name in tensors if name.startswith("transformer.")])
    for name, value in state.items():
        assert value.dtype == torch.float32 and torch.equal(value, tensors[f"transformer.{name}"].float()), name
    assert not any(p.requires_grad for p in model.transformer.parameters()) and not model.transformer.training
    form = model.rollout
    assert (form.frames_per_block, form.window_frames, model.num_frames, model.fps) == (BLOCK, WINDOW, FRAMES, 12)
    assert model.rollout.schedule == FlowSchedule((1000, 500), 2.0)
    codec = ToyCodec.fit(channels=8, frames=64)
    latents = torch.randn(1, 2, *model.latent_size)
    expected = codec.to_uint8(codec.decode(latents))[0].numpy()
    assert (model.decoder().decode(latents) == expected).all() and expected.shape == (2, SIDE, SIDE, 3)
    assert model.encode_text(PROMPT).shape == (1, 5, 32)


def test_saving_again_replaces(copy, model):
    (copy / "README.md").write_text("model card")
    codec = ToyCodec.fit(channels=8, frames=64)
    save_toy_model(copy, model.transformer, codec, rollout=RolloutConfig((1000,), 3.0), dtype=torch.bfloat16)
    again = load_video_model(copy, "cpu")
    assert again.rollout.schedule == FlowSchedule((1000,), 3.0) and again.num_frames == 4 * again.train_frames
    assert sorted(p.name for p in copy.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_what_cannot_be_used_is_not_saved(tmp_path, model):
    broken = load_video_model(model.name, "cpu").transformer
    codec, rollout = ToyCodec.fit(channels=8, frames=64), RolloutConfig((1000,), 3.0)
    fives = dataclasses.replace(rollout, frames_per_block=5)
    for settings, message in (({"rollout": fives}, "whole blocks of 5"), ({"fps": 0}, "fps must be a number")):
        with pytest.raises(ValueError, match=message):
            save_toy_model(tmp_path / "m", broken, codec, **{"rollout": rollout, **settings})
    with torch.no_grad():
        broken.blocks[0].ffn[0].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"transformer\.blocks\.0\.ffn\.0\.weight is not finite in torch.float16"):
        save_toy_model(tmp_path / "m", broken, codec, rollout=rollout)
    assert list(tmp_path.iterdir()) == []


def edit_tensors(change):
    def edit(folder):
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS)

    return edit


def edit_config(change):
    def edit(folder):
        values = json.loads((folder / CONFIG).read_text())
        change(values)
        (folder / CONFIG).write_text(json.dumps(values))

    return edit


Q = "transformer.blocks.0.self_attn.q.weight"
DAMAGES = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"model\.safetensors: no such file"),
    "no config": (lambda f: (f / CONFIG).unlink(), r"config\.json: no such file"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:5000]), "safetensors: corrupt"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "safetensors: corrupt"),
    "tensor gone": (edit_tensors(lambda t: t.pop(Q)), rf"1 missing key \({Q}\)"),
    "tensor too many": (edit_tensors(lambda t: t.update({"transformer.x": t[Q] * 1})), r"unexpected key \(transformer"),
    "stranger": (edit_tensors(lambda t: t.update({"vae.x": t[Q] * 1})), "unexpected tensor vae.x; expected trans"),
    "shape": (edit_tensors(lambda t: t.update({Q: t[Q][:5] * 1})), rf"{Q} is \[5, 32\], expected \[32, 32\]"),
    "integers": (edit_tensors(lambda t: t.update({Q: t[Q].int()})), r"q\.weight is torch.int32, expected one of"),
    "codec gone": (edit_tensors(lambda t: t.pop("codec.basis")), "codec state lacks basis"),
    "codec shape": (edit_tensors(lambda t: t.update({"codec.mean": torch.ones(9)})), "codec tensors do not fit"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), r"config\.json: corrupt"),
    "another format": (edit_config(lambda c: c.update(format="wan")), 'format must be "hiar-toy"'),
    "key gone": (edit_config(lambda c: c.pop("fps")), "key fps is missing"),
    "unknown key": (edit_config(lambda c: c.update(fbs=12)), "unknown key fbs; known: format, transformer"),
    "unknown size": (edit_config(lambda c: c["transformer"].update(deph=2)), r"unknown key transformer\.deph"),
    "wrong size": (edit_config(lambda c: c["transformer"].update(num_layers=2)), r"missing keys .*blocks\.1\."),
    "wrong kind": (edit_config(lambda c: c["transformer"].update(dim="wide")), "dim must be a whole number"),
    "odd frame": (edit_config(lambda c: c["world"].update(height=36)), "frame size 36x32 must be a multiple of 8"),
    "zero": (edit_config(lambda c: c["rollout"].update(frames_per_block=0)), "frames_per_block must be a whole number"),
    "no schedule": (edit_config(lambda c: c["rollout"].update(steps=[])), "steps must fall within"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused(copy, damage):
    change, message = DAMAGES[damage]
    change(copy)
    with refused(message) as caught:
        load_video_model(copy, "cpu")
    assert str(copy) in str(caught.value)


def test_a_misspelt_option_is_named_with_the_nearest():
    """Not "VideoOptions.__init__() got an unexpected keyword argument"."""
    pipeline = hiar_model.VideoPipeline("toy")
    for call, name in {
        hiar_model.generate: "generate", hiar_model.stream: "stream", pipeline: "VideoPipeline",
        pipeline.stream: "VideoPipeline.stream",
    }.items():  # fmt: skip
        with pytest.raises(TypeError, match=rf"^{name}\(\) takes no argument 'num_frame'; did you mean num_frames\?$"):
            call("a red circle moving right", num_frame=9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wan2.1-t2v-1.3b", "; shipped: toy, scenes; this one names a size, without weights$"),
        ("Owner/Wan2.1-T2V-1.3B", "; shipped: toy, scenes; nothing is downloaded: give the folder with its files$"),
        ("https://host/wan", "model must be the path of a file or folder, got https://host/wan: a URL"),
    ],
)
def test_a_name_of_something_else_than_a_model_here(name, message):
    with pytest.raises(ValueError, match=message):
        load_video_model(name)


def test_the_folder_of_a_cache_names_the_one_inside(tmp_path):
    (inside := tmp_path / "snapshots" / "0a1b").mkdir(parents=True)
    (inside / "model_index.json").touch()
    with pytest.raises(ValueError, match=rf"no model there, but in {inside}: give that folder$"):
        load_video_model(tmp_path)


@pytest.mark.parametrize("name", ["toys", "", "/nowhere/model"])
def test_no_such_model(name):
    with pytest.raises(ValueError, match=r"is neither a folder nor a shipped model; shipped: toy, scenes$"):
        load_video_model(name)


# Prompt to video


def test_the_same_arguments_give_the_same_video(model, folder):
    first = generate(PROMPT, model=model)
    assert first.frames.shape == (FRAMES, SIDE, SIDE, 3) and first.frames.dtype == np.uint8 and first.fps == 12
    assert (generate(PROMPT, model=str(folder), device="cpu", dtype="float32").frames == first.frames).all()
    for other in ({"seed": 1}, {"steps": 3}, {"order": "block_first"}, {"window_frames": 3}, {"sink_frames": 3}):
        assert (generate(PROMPT, model=model, **other).frames != first.frames).any(), other
    assert (generate("a blue plus moving up", model=model).frames != first.frames).any()


def test_a_generation_that_is_dropped_gives_its_memory_back_at_once(model):
    made = prepare(PROMPT, model=model, num_frames=FRAMES, on_progress=lambda *told: None)
    for _ in made:
        pass
    ring = weakref.ref(made.rollout._executor.cache.k[0])
    gc.collect()  # what was imported on the way
    gc.disable()
    try:
        del made
        assert ring() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("order", ["step_first", "stream", "wavefront"])
def test_every_walk_gives_the_same_video(model, order):
    expected = generate(PROMPT, model=model).frames.astype(int)
    blocks = list(stream(PROMPT, model=model, num_frames=FRAMES, order=order))
    assert [block.shape for block in blocks] == [(BLOCK, SIDE, SIDE, 3)] * (FRAMES // BLOCK)
    assert np.abs(np.concatenate(blocks) - expected).max() <= 1


@pytest.mark.parametrize("order", ["stream", "wavefront", "block_first"])
def test_endless(model, order):
    begun = np.concatenate(list(itertools.islice(stream(PROMPT, model=model, order=order), 6)))
    finite = np.concatenate(list(stream(PROMPT, model=model, order=order, num_frames=6 * BLOCK)))
    assert np.abs(begun.astype(int) - finite).max() <= 1


def test_a_model_with_a_window_for_each_step(model):
    own = dataclasses.replace(model, rollout=dataclasses.replace(model.rollout, window_frames=(4, 9)))
    asked = generate(PROMPT, model=model, window_frames=[4, 9])
    assert (generate(PROMPT, model=own).frames == asked.frames).all()
    assert asked.metadata["rollout"]["window_frames"] == [4, 9]
    with pytest.raises(ValueError, match=r"one per step \(3\), got \(4, 9\)"):
        generate(PROMPT, model=own, steps=3)


def test_other_dtypes(model, folder):
    for dtype in ("bfloat16", "float64"):
        video = generate(PROMPT, model=folder, device="cpu", dtype=dtype)
        assert np.abs(video.frames.astype(int) - generate(PROMPT, model=model).frames).mean() < 8
        assert video.metadata["dtype"] == dtype


ILLEGAL = {
    "empty prompt": ({"prompt": "  "}, "the prompt is empty; the grammar is"),
    "unknown word": ({"prompt": "a pink circle moving up"}, "'pink' is no legal colour .* red, green, blue"),
    "no prompt": ({"prompt": None}, "a prompt is a string, got NoneType"),
    "between blocks": ({"num_frames": 13}, "got 13, nearest 12 or 15"),
    "below a block": ({"num_frames": 2}, "got 2, nearest 3$"),
    "no frames": ({"num_frames": 0}, "num_frames must be a whole number of at least 1, got 0"),
    "negative frames": ({"num_frames": -3}, "num_frames must be a whole number of at least 1, got -3"),
    "half a frame": ({"num_frames": 1.5}, "num_frames must be a whole number"),
    "no steps": ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
    "order": ({"order": "reverse"}, "order must be one of step_first, stream, wavefront, block_first, got 'reverse'"),
    "seed": ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    "window": ({"window_frames": 2}, "window_frames must be a whole number of at least 3 .*got 2"),
    "window word": ({"window_frames": "wide"}, "window_frames must be a number"),
    "sink": ({"sink_frames": -1}, "sink_frames must be a whole number of at least 0"),
    "large sink": ({"sink_frames": 7}, "window_frames must be a whole number of at least 10"),
    "fps": ({"fps": 0}, "fps must be a number from 0.01 to 1000, got 0"),
    "a rate that no file can hold": ({"fps": 1e6}, "fps must be a number from 0.01 to 1000, got 1000000.0"),
    "more steps than levels": ({"steps": 10**7}, "steps must be a whole number from 1 to 1000, got 10000000"),
    "threads without number": ({"threads": 10**5}, r"threads must be a whole number from 1 to \d+, got 100000"),
    "half a window": ({"window_frames": 2.5}, "window_frames must be None, one number .*got 2.5"),
    "a true window": ({"window_frames": True}, "window_frames must be None, one number .*got True"),
    "an array of windows": ({"window_frames": np.array([6, 6, 6])}, "window_frames must .* per step .2., got array"),
    "no model": ({"model": None}, "model must be the path of a file or folder, got None"),
    "image": ({"image": 3}, r"image must be a file, \(file, number\), or a list of these, got 3"),
    "clip": ({"extend": b"x.mp4"}, "extend must be the path of a clip, got b'x.mp4'"),
    "session": ({"session": 3}, "session must be the path of a file or folder, got 3"),
    "a session with a number for an end": ({"open_end": 1}, "open_end must be True or False, got 1"),
    "resume alone": ({"resume": True}, "resume=True needs the run_folder to go on from, got None"),
    "a run folder": ({"run_folder": b"run"}, "run_folder must be the path of a file or folder, got b'run'"),
    "states": ({"checkpoint_every": -1}, "checkpoint_every must be a whole number of at least 0, got -1"),
    "a clip elsewhere": ({"extend": "https://host/a.mp4"}, "extend must be the path of a clip, got https://host/a.mp4"),
    "prompts": ({"prompts": "a.txt"}, "prompts must be a PromptSchedule .* got 'a.txt'"),
    "progress": ({"on_progress": 3}, "on_progress must be a function or None, got 3"),
    "device": ({"device": "abacus"}, "unknown device 'abacus'; legal: auto, cpu"),
    "device number": ({"device": "cuda:99"}, "is not there"),
    "dtype": ({"dtype": "int8"}, "unknown dtype 'int8'; legal: float32"),
    "other dtype": ({"dtype": "float64"}, "dtype must be that of the loaded model, torch.float32, got float64"),
    "model": ({"model": "nowhere"}, "'nowhere' is neither a folder nor a shipped model"),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
@pytest.mark.parametrize("make", [generate, stream])
def test_illegal_requests(model, name, make, monkeypatch):
    monkeypatch.setattr(type(model.transformer), "run", None)  # no work may start
    wrong, message = ILLEGAL[name]
    with refused(message):
        make(**{"prompt": PROMPT, "model": model, **wrong})


def test_endless_needs_a_window_and_an_order(model):
    with pytest.raises(ValueError, match="window_frames must be a number for a video without num_frames, got None"):
        stream(PROMPT, model=model, window_frames=None)
    with pytest.raises(ValueError, match="order must be one of stream, wavefront, .* got step_first"):
        stream(PROMPT, model=model, order="step_first")
    assert len(generate(PROMPT, model=model, window_frames=None, order="stream")) == FRAMES


def test_legal_lengths_of_a_model_that_packs_time(model):
    packed = dataclasses.replace(model, temporal_compression=4, num_frames=81, train_frames=81)
    assert [packed.latent_frames(n) for n in (9, 21, 81)] == [3, 6, 21]
    for wrong, near in ((1, "9"), (13, "9 or 21"), (48, "45 or 57"), (80, "69 or 81"), (82, "81 or 93")):
        with pytest.raises(ValueError, match=f"got {wrong}, nearest {near}$"):
            packed.latent_frames(wrong)


def test_progress(model):
    seen = []
    generate(PROMPT, model=model, on_progress=lambda *figures: seen.append(figures))
    frames, frames_total, forwards, forwards_total = zip(*seen, strict=True)
    assert set(frames_total) == {FRAMES} and len(set(forwards_total)) == 1
    assert list(frames) == sorted(frames) and list(forwards) == sorted(forwards)
    assert seen[-1] == (FRAMES, FRAMES, forwards_total[0], forwards_total[0]) and forwards[0] > 0
    seen.clear()
    next(stream(PROMPT, model=model, on_progress=lambda *figures: seen.append(figures)))
    assert seen[-1][:2] == (BLOCK, None) and seen[-1][3] is None


def test_not_finite_is_an_error(folder):
    broken = load_video_model(folder, "cpu")
    broken.transformer.head.head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step.*block"):
        generate(PROMPT, model=broken)


def test_an_image_and_a_clip_to_go_on_from(model, tmp_path):
    first = generate(PROMPT, model=model)
    save_png(first.frames[0], tmp_path / "first.png")
    blocks = list(stream(PROMPT, model=model, num_frames=1 + 2 * BLOCK, image=tmp_path / "first.png"))
    assert [len(block) for block in blocks] == [1, BLOCK, BLOCK]
    assert (blocks[0][0] == first.frames[0]).all()
    Video(first.frames[:5], 12).save(tmp_path / "c.mp4", least_side=1)
    run = prepare(PROMPT, model=model, extend=tmp_path / "c.mp4")
    assert run.num_frames == 5 + FRAMES and [len(frames) for frames in run] == [5, *[BLOCK] * (FRAMES // BLOCK)]
    with pytest.raises(ValueError, match="behind 5 conditioning frames: got 12, nearest 11 or 14"):
        prepare(PROMPT, model=model, num_frames=12, extend=tmp_path / "c.mp4")


def test_black_is_an_error(model):
    class Dark:
        def __init__(self):
            self.calls = 0

        def decode(self, latents):
            self.calls += 1
            return np.full((BLOCK, SIDE, SIDE, 3), 0 if self.calls == 3 else 9, np.uint8)

    dark = dataclasses.replace(model, new_decoder=Dark)
    with pytest.raises(FloatingPointError, match="frames 6 to 8 are all black: step 1, block 2"):
        generate(PROMPT, model=dark)


def test_metadata_is_complete(model):
    video = generate(PROMPT, model=model, seed=3, steps=2, order="stream", fps=8)
    told = json.loads(json.dumps(video.metadata))
    assert told["prompt"] == PROMPT and told["weights_sha256"] == model.weights_sha256
    form = RolloutConfig.from_dict(told["rollout"])
    assert (told["seed"], len(form.steps), form.order, told["fps"]) == (3, 2, "stream", 8)
    assert told["timesteps"] == pytest.approx([1000, 2000 / 3]) and told["versions"]["torch"] == torch.__version__
    assert (form.window_frames, form.sink_frames, told["num_frames"]) == (WINDOW, 0, FRAMES)
    assert (told["device"], told["dtype"]) == ("cpu", "float32")


# The package


def test_public_names():
    for name in hiar_model.__all__:
        assert getattr(hiar_model, name) is not None, name
    assert set(hiar_model.__all__) <= set(dir(hiar_model))
    assert callable(hiar_model.rollout) and hiar_model.train
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hiar_model.nonsense  # noqa: B018


def test_import_is_cheap():
    use = "import sys, hiar_model, hiar_model.cli; hiar_model.cli.build_parser()"
    code = f"{use}; print(*{{'torch', 'numpy', 'av'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# The form that a model was trained in


@pytest.mark.parametrize(
    ("form", "order", "source"),
    [
        ({}, "wavefront", "own"),  # a small one on a CPU, the same result
        ({"order": "wavefront"}, "wavefront", "own"),
        ({"order": "block_first"}, "block_first", "own"),
        ({"order": "stream", "kv_source": "next_step"}, "stream", "next_step"),
    ],
)
def test_a_model_is_rolled_out_as_it_was_trained(model, form, order, source):
    trained = dataclasses.replace(model, rollout=dataclasses.replace(model.rollout, **form))
    video = hiar_model.generate(PROMPT, model=trained, seed=3)
    assert [video.metadata["rollout"][name] for name in ("order", "kv_source")] == [order, source]
    # asked of the plan too: in a network of one layer lent keys are those of its own tasks
    plan = prepare(PROMPT, model=trained).rollout.plan
    assert (plan.order, plan.kv_source) == (order, source)
    _, height, width = model.latent_size
    form = RolloutConfig((1000, 500), 2.0, order, BLOCK, WINDOW, kv_source=source)
    rollout = hiar_model.Rollout(
        model.transformer,
        model.encode_text(PROMPT),
        form,
        num_latent_frames=FRAMES,
        latent_size=(height, width),
        seed=3,
    )
    expected = [model.decoder().decode(block.latents) for block in rollout]
    assert (video.frames == np.concatenate(expected)).all()
    other = hiar_model.generate(PROMPT, model=trained, seed=3, order="stream" if order == "block_first" else order)
    assert (other.frames == video.frames).all() == (order != "block_first"), "an order that is asked for is taken"


def test_shared_kv_refuses_an_order_that_has_none(model):
    lent = dataclasses.replace(model, rollout=dataclasses.replace(model.rollout, order="stream", kv_source="next_step"))
    with pytest.raises(ValueError, match="'next_step' is impossible with order='step_first'"):
        hiar_model.generate(PROMPT, model=lent, order="step_first")
