"""HiARPipeline: equal to VideoPipeline, and to WanPipeline where both compute the same; used as a DiffusionPipeline.

On small random weights in diffusers' layout, with the real library.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wan_files
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.callbacks import PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from hiar_pipelines import hiar_pipe, load, quiet, seeded, wan_folder  # noqa: F401
from PIL import Image
from safetensors.torch import load_file

from hiar_model import ExecutionConfig, RolloutConfig, VideoPipeline, load_video_model
from hiar_model.integrations.diffusers import HiARPipeline
from hiar_model.integrations.diffusers.options import as_output, seed_of
from hiar_model.models.transformer import HiARTransformer
from hiar_model.pipelines.video_pipeline import VideoOptions

pytestmark = pytest.mark.cpu

PROMPT, NEXT = wan_files.PROMPT, "a blue square moving up"
SIZE = {"height": 16, "width": 32}
LATENT = (16, 2, 4)  # channels, height, width
FRAMES = 21  # 6 latent frames, two blocks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    wan_files.write_training(root / "hiar.pt", {"generator": 1, "generator_ema": 0})
    wan_files.write_training(root / "self_forcing.pt", {"generator": 1}, "model._fsdp_wrapped_module.{}".format)
    return root


def wan_pipeline(folder: Path, **parts: Any) -> WanPipeline:
    """diffusers' pipeline of a folder. Its own loader reads a transformer only where accelerate is installed."""
    transformer = copy.deepcopy(wan_files.diffusers_transformer())
    return quiet(WanPipeline.from_pretrained(folder, transformer=transformer, **parts))


def make(pipe: HiARPipeline, prompt: Any = PROMPT, **options: Any) -> Any:
    """What a call gives; two blocks of seed 0 unless told otherwise."""
    generator = options.pop("generator", seeded())
    return pipe(prompt, **{"num_frames": FRAMES, **SIZE, "generator": generator, **options}).frames


@pytest.fixture(scope="module")
def latents(pipe) -> torch.Tensor:
    """[1, C, F, h, w] of :func:`make`."""
    return make(pipe, output_type="latent")


def rollout_latents(model: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    """[1, C, F, h, w] of VideoPipeline, taken from its rollout."""
    run = VideoPipeline(model).prepare(VideoOptions(PROMPT, num_frames=FRAMES, seed=seed, **SIZE, **options))
    return torch.cat([block.latents for block in run.rollout], 1).transpose(1, 2)


# The same numbers


def test_equals_video_pipeline(folder, pipe, latents):
    model = load_video_model(folder, "cpu", "float32")
    assert latents.shape == (1, 16, 6, 2, 4) and torch.equal(latents, rollout_latents(model))
    frames = make(pipe)
    assert frames.shape == (1, FRAMES, 16, 32, 3) and frames.dtype == np.float32
    expected = VideoPipeline(model)(PROMPT, num_frames=FRAMES, seed=0, **SIZE).frames
    assert np.array_equal((frames[0] * 255).round().astype(np.uint8), expected)
    rollout = dataclasses.replace(pipe.rollout, window_frames=3, order="block_first")
    found = make(pipe, num_inference_steps=2, rollout=rollout, output_type="latent")
    expected = rollout_latents(model, steps=2, window_frames=3, order="block_first")
    assert torch.equal(found, expected) and not torch.equal(found, latents)


@pytest.mark.parametrize("checkpoint", ["hiar.pt", "self_forcing.pt"])
def test_with_a_checkpoint(folder, checkpoints, pipe, latents, checkpoint):
    told = []
    loaded = load(folder, checkpoint=checkpoints / checkpoint, on_checkpoint=told.append, torch_dtype=torch.bfloat16)
    assert [info.layout for info in told] == ["training"]
    assert (
        loaded.transformer.dtype == torch.bfloat16 and loaded.transformer.blocks[0].norm2.weight.dtype == torch.float32
    )
    model = load_video_model(folder, "cpu", "bfloat16", checkpoint=checkpoints / checkpoint)
    video = make(loaded, output_type="latent")
    expected = rollout_latents(model)
    assert video.dtype == torch.bfloat16 and torch.equal(video, expected)
    alike = float((video.float() - latents).abs().max()) < 0.2  # bfloat16 of the same weights, or other weights
    assert alike == (checkpoint == "hiar.pt")


def test_equals_wan_pipeline_in_one_step_of_one_block(folder, pipe):
    """Text, network, scheduler and VAE at once. 1e-3: the sinusoid of timestep 1000 is float32 there (1e-4 in the
    velocity), and the VAE multiplies it.
    """
    theirs = wan_pipeline(folder, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0))
    noise = torch.randn(2, 16, 3, 2, 4, generator=seeded(7))
    options = {"latents": noise, "num_frames": 9, "num_inference_steps": 1, **SIZE}
    for output, bound in (("latent", 1e-3), ("np", 1e-3 + 0.5 / 255)):
        want = theirs([PROMPT, NEXT], guidance_scale=1.0, output_type=output, **options).frames
        found = pipe([PROMPT, NEXT], output_type=output, **options).frames
        want, found = (torch.as_tensor(x) for x in (want, found))
        assert found.shape == want.shape and float((found - want).abs().max()) < bound
        assert float((want[0] - want[1]).abs().max()) > 0.05


def test_no_command_makes_a_video_of_the_pipelines_weights(pipe):
    """That of its folder would take the folder's weights in place of the checkpoint's."""
    video = VideoPipeline(pipe.video_model)(PROMPT, num_frames=9, steps=1, **SIZE)
    assert "command" not in video.metadata and video.metadata["weights_sha256"] == ""


def test_the_weights_are_shared(folder):
    """The network of the rollout uses the memory of the transformer, and follows it when it moves."""
    pipe = load(folder)
    network = pipe.video_model.transformer
    assert isinstance(network, HiARTransformer) and pipe.video_model.transformer is network
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    theirs = {p.untyped_storage().data_ptr() for p in pipe.transformer.parameters()}
    assert own == theirs
    before = make(pipe, output_type="latent")
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.to_q.weight.mul_(1.5)
    after = make(pipe, output_type="latent")
    assert not torch.equal(after, before)
    pipe.transformer.load_state_dict(wan_files.diffusers_transformer().state_dict())
    assert torch.equal(make(pipe, output_type="latent"), before)
    pipe.to(torch.float64)
    assert pipe.video_model.dtype == torch.float64 and pipe.video_model.transformer is not network


# As a DiffusionPipeline


def test_saved_and_loaded(folder, pipe, latents, tmp_path):
    config = RolloutConfig(steps=(1000, 500), shift=3.0, window_frames=6, sink_frames=1, frames_per_block=2)
    changed = quiet(HiARPipeline(**pipe.components, rollout=config))
    assert changed.scheduler.config.shift == 3.0 and changed.rollout == config and changed.num_timesteps == 2
    changed.save_pretrained(tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model_index.json").read_text())
    assert index["_class_name"] == "HiARPipeline" and index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert index["rollout"]["steps"] == [1000, 500] and "shift" not in index["rollout"]
    assert not [p for p in tmp_path.iterdir() if p.name != "new"], "a partial folder was left"
    again = load(tmp_path / "new")
    assert again.rollout == config
    options = {"num_frames": 29, "output_type": "latent"}  # 8 latent frames, four blocks
    assert torch.equal(make(again, **options), make(changed, **options))
    again.rollout = pipe.rollout
    assert again.scheduler.config.shift == 5.0 and torch.equal(make(again, output_type="latent"), latents)
    again.save_pretrained(tmp_path / "new")  # into a folder that exists
    theirs = wan_pipeline(tmp_path / "new")
    assert type(theirs.scheduler) is FlowMatchEulerDiscreteScheduler and theirs.scheduler.config.shift == 5.0
    written = load_file(tmp_path / "new" / "transformer" / "diffusion_pytorch_model.safetensors")
    for key, value in wan_files.diffusers_transformer().state_dict().items():
        assert torch.equal(written[key], value), key


def test_from_another_pipeline(folder, latents):
    theirs = wan_pipeline(folder)
    parts = {name: theirs.components[name] for name in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")}
    for pipe in (HiARPipeline.from_pipe(theirs), HiARPipeline(**parts)):
        assert pipe.transformer is theirs.transformer and pipe.rollout.shift == 5.0
        assert torch.equal(make(quiet(pipe), output_type="latent"), latents)


def test_forms_of_output(pipe):
    frames = make(pipe)
    points = make(pipe, output_type="pt")
    assert points.shape == (1, FRAMES, 3, 16, 32) and np.array_equal(points.movedim(2, -1).numpy(), frames)
    (pictures,) = make(pipe, output_type="pil")
    assert isinstance(pictures[0], Image.Image) and len(pictures) == FRAMES
    assert np.array_equal(np.stack(pictures), (frames[0] * 255).round())
    both = pipe(PROMPT, num_frames=FRAMES, **SIZE, generator=seeded(), return_dict=False)
    assert isinstance(both, tuple) and np.array_equal(both[0], frames)
    assert isinstance(pipe(PROMPT, num_frames=9, **SIZE, num_inference_steps=1), WanPipelineOutput)


def test_all_levels_survive_an_export():
    """diffusers' export_to_video multiplies by 255 and cuts off."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, -1)
    assert np.array_equal((as_output(levels, "np") * 255).astype(np.uint8), levels)


def test_the_signature_is_that_of_wan_pipeline():
    ours, theirs = (inspect.signature(c.__call__).parameters for c in (HiARPipeline, WanPipeline))
    left_out = {"guidance_scale_2", "negative_prompt_embeds", "attention_kwargs"}
    names = [name for name in theirs if name not in left_out]
    assert [name for name in ours if name in theirs] == names
    assert set(ours) - set(theirs) == {"image", "rollout", "order"}


def test_arguments_without_effect_may_be_none(pipe, latents):
    """Scripts for WanPipeline hand on all its arguments."""
    none = dict.fromkeys(("negative_prompt", "negative_prompt_embeds", "guidance_scale_2", "attention_kwargs"))
    assert torch.equal(make(pipe, output_type="latent", **none), latents)


def test_generators(pipe, latents):
    used = seeded()
    first, second = (make(pipe, generator=used, output_type="latent") for _ in range(2))
    assert torch.equal(first, latents) and not torch.equal(second, latents)
    torch.manual_seed(3)
    one, two = (make(pipe, generator=None, output_type="latent") for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(make(pipe, generator=None, output_type="latent"), one) and not torch.equal(one, two)
    assert seed_of(seeded(12)) == 12 and seed_of(torch.Generator().manual_seed(-1)) == 2**64 - 1


def test_a_batch(pipe, latents):
    """Videos of a batch are those made alone, up to rounding; each generator is of its own video."""
    short = "a cat"  # padded beside the other
    other = make(pipe, short, generator=seeded(5), output_type="latent")
    both = make(pipe, [PROMPT, short], generator=[seeded(0), seeded(5)], output_type="latent")
    assert float((both - torch.cat([latents, other])).abs().max()) < 1e-4 < float((latents - other).abs().max())
    two = make(pipe, num_videos_per_prompt=2, output_type="latent")
    assert float((two[:1] - latents).abs().max()) < 1e-4 and float((two[1:] - latents).abs().max()) > 0.1
    frames = make(pipe, [PROMPT, short], num_frames=9, generator=seeded())
    assert frames.shape == (2, 9, 16, 32, 3)


def test_prompt_embeds_and_latents(pipe, latents):
    embeds, none = pipe.encode_prompt(PROMPT)
    assert none is None
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 512 - embeds.shape[1]))
    for one, bound in ((embeds, 0.0), (padded, 1e-4)):
        found = make(pipe, None, prompt_embeds=one, output_type="latent")
        assert float((found - latents).abs().max()) <= bound
    noise = torch.randn(1, *LATENT[:1], 6, *LATENT[1:], generator=seeded(1))
    given = {"latents": noise, "output_type": "latent"}
    one, two = (make(pipe, generator=seeded(s), **given) for s in (0, 9))
    assert not torch.equal(one, two), "the noise of the steps is the generator's"
    same = make(pipe, generator=[seeded(0)], num_frames=None, **given)
    assert torch.equal(one, same) and not torch.equal(one, latents)


def test_a_stream(pipe):
    parts = list(pipe.stream(PROMPT, num_frames=FRAMES, generator=seeded(), **SIZE))
    assert [part.shape[1] for part in parts] == [9, 12]
    assert np.abs(np.concatenate(parts, 1) - make(pipe)).max() <= 1 / 255  # an order of its own, rounded otherwise
    endless = pipe.stream(PROMPT, generator=seeded(), output_type="pil", **SIZE)
    assert [len(next(endless)[0]) for _ in range(3)] == [9, 12, 12]
    endless.close()
    with pytest.raises(ValueError, match="order must be one of stream, wavefront, block_first for a video without num"):
        pipe.stream(PROMPT, order="step_first", **SIZE)


def test_an_image_first(pipe):
    picture = Image.effect_noise((64, 20), 80).convert("RGB")
    frames = make(pipe, image=picture, num_frames=13)
    first = (frames[0, 0] * 255).round().astype(np.uint8)
    assert frames.shape[1] == 13 and first.std() > 5
    exact = Image.fromarray(first)
    for same in (exact, first):
        again = make(pipe, image=same, num_frames=13)
        assert np.array_equal((again[0, 0] * 255).round(), first) and np.array_equal(again, frames)
    assert make(pipe, image=exact, num_frames=13, output_type="latent").shape[2] == 4
    with pytest.raises(ValueError, match="num_frames must fill whole blocks of 3 latent frames, behind 1 conditioning"):
        make(pipe, image=exact)
    with pytest.raises(ValueError, match="image must be a PIL image, uint8"):
        make(pipe, image=3)


def test_an_execution(pipe, latents):
    other = quiet(HiARPipeline(**pipe.components, execution=ExecutionConfig(kv_dtype="float8_e4m3fn")))
    found = make(other, output_type="latent")
    assert not torch.equal(found, latents) and float((found - latents).abs().max()) < 0.5


def test_linear_layers_that_are_loaded_in_8_bits(folder, latents, tmp_path):
    """The same latents as with 8-bit layers beside full weights; those of diffusers' model are in 8 bits too."""
    execution = ExecutionConfig(linear_dtype="float8_e4m3fn")
    full = load(folder)
    full.execution = execution
    narrow = load(folder, execution=execution)
    found = make(narrow, output_type="latent")
    assert torch.equal(found, make(full, output_type="latent")) and not torch.equal(found, latents)
    attention, network = narrow.transformer.blocks[0].attn1, narrow.video_model.transformer
    assert attention.to_v.weight.dtype == torch.float8_e4m3fn and attention.to_v.weight_scale.dtype == torch.float32
    own = network.blocks[0].self_attn.qkv.weight
    assert own.data_ptr() == attention.to_q.weight.data_ptr()  # one memory
    x, t, text = torch.ones(1, 16, 1, 2, 4), torch.tensor([500.0]), torch.ones(1, 4, network.config.text_dim)
    ours, theirs = (pipe.transformer(x, t, text).sample for pipe in (narrow, full))
    assert 0 < float((ours - theirs).abs().max()) < 0.2 * float(theirs.abs().max())
    with pytest.raises(ValueError, match="in 8 bits, which diffusers does not read"):
        narrow.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# Callbacks


def test_a_callback_sees_each_step_of_each_block(pipe, latents):
    seen = []

    def note(own: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        assert own is pipe and float(timestep) == float(own.current_timestep) and own.num_timesteps == 4
        seen.append((own.current_block, step, float(timestep), values))
        return values

    inputs = ["latents", "prompt_embeds"]
    found = make(
        pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=inputs, order="stream", output_type="latent"
    )
    assert [(block, step) for block, step, *_ in seen] == [(block, step) for block in range(2) for step in range(4)]
    assert [round(t, 1) for _, _, t, _ in seen[:4]] == [1000.0, 937.5, 833.3, 625.0]
    assert all(values.keys() == set(inputs) and values["latents"].shape == (1, 16, 3, 2, 4) for *_, values in seen)
    assert torch.equal(torch.cat([seen[3][-1]["latents"], seen[7][-1]["latents"]], 2), found)
    assert float((found - latents).abs().max()) < 1e-4  # looking on changes nothing


def test_what_a_callback_returns_counts(pipe):
    def zero(own: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 0} if step == 3 and own.current_block == 0 else {}

    found = make(pipe, callback_on_step_end=zero, order="stream", output_type="latent")
    plain = make(pipe, order="stream", output_type="latent")
    assert not found[:, :, :3].any() and float((found[:, :, 3:] - plain[:, :, 3:]).abs().max()) > 1e-3
    other, _ = pipe.encode_prompt(NEXT)

    def change(own: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": other} if step == 3 else values

    found = make(pipe, callback_on_step_end=change, order="stream", output_type="latent")
    assert torch.equal(found[:, :, :3], plain[:, :, :3])
    assert float((found[:, :, 3:] - plain[:, :, 3:]).abs().max()) > 1e-3


class Stop(PipelineCallback):
    """diffusers' own kind of callback."""

    tensor_inputs = ["prompt_embeds"]  # noqa: RUF012

    def callback_fn(self, pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        assert values.keys() == {"prompt_embeds"}
        pipeline._interrupt = (pipeline.current_block, step) == (1, self.config.cutoff_step_index)
        return values


def test_an_interrupt(pipe, latents):
    found = make(pipe, callback_on_step_end=Stop(None, 1), order="stream", output_type="latent")
    assert found.shape[2] == 3 and torch.equal(found, make(pipe, order="stream", output_type="latent")[:, :, :3])
    with pytest.raises(ValueError, match="interrupted before its first block was finished"):
        make(pipe, callback_on_step_end=Stop(None, 1), order="step_first")


def test_the_progress_bar(folder, capsys):
    pipe = HiARPipeline.from_pretrained(folder)
    capsys.readouterr()
    make(pipe, num_inference_steps=2)
    assert "4/4" in capsys.readouterr().err  # two steps of two blocks
    quiet(pipe)
    make(pipe, num_inference_steps=1)
    assert capsys.readouterr().err == ""


# Models that wait on the CPU


class Hook:
    """As accelerate's hook of a model: brings it to the device, and sends away the one before it."""

    def __init__(self, name: str, before: str | None, log: list[str]) -> None:
        self.name, self.before, self.log = name, before, log

    def pre_forward(self, module: Any, *args: Any) -> None:
        self.log.append(f"{self.name} for {self.before}")


def test_offload(pipe, latents, monkeypatch):
    """The order in which models come, as enable_model_cpu_offload prepares it; that itself needs a GPU."""
    own = quiet(HiARPipeline(**pipe.components))
    log: list[str] = []
    before = None
    for name in own.model_cpu_offload_seq.split("->"):
        monkeypatch.setattr(getattr(own, name), "_hf_hook", Hook(name, before, log), raising=False)
        before = name
    monkeypatch.setattr(own, "_all_hooks", [SimpleNamespace()], raising=False)
    monkeypatch.setattr(type(own), "maybe_free_model_hooks", lambda self: log.append("free"))
    run = own.text_encoder.forward
    monkeypatch.setattr(own.text_encoder, "forward", lambda **k: (log.append("text"), run(**k))[1])
    make(own, callback_on_step_end=lambda *_: log.append("step"), num_inference_steps=1)
    once = ["text", "transformer for text_encoder", "step", "step", "vae for transformer", "free"]
    assert log == once
    log.clear()
    assert torch.equal(make(own, output_type="latent"), latents)
    assert log == ["text", "transformer for text_encoder", "free"]
    log.clear()
    stream = own.stream(PROMPT, num_frames=FRAMES, **SIZE)
    next(stream)
    assert log == once[:2]
    stream.close()
    assert log == [*once[:2], "free"]


def test_offload_by_accelerate(folder, latents):
    """Its own hooks, with a CPU in the place of the GPU."""
    own = load(folder)
    own.enable_model_cpu_offload(device="cpu")
    assert own._all_hooks and torch.equal(make(own, output_type="latent"), latents)
    assert torch.equal(make(own, output_type="latent"), latents)  # hooks are there for the next call too


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "give either prompt or prompt_embeds, got neither"),
        ({"prompt": 3}, "prompt must be a string, or a list of at least one, got 3"),
        ({"prompt": []}, "prompt must be a string, or a list of at least one"),
        ({"prompt_embeds": torch.zeros(1, 4, 32)}, "give either prompt or prompt_embeds, got both"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 4, 9)},
            r"prompt_embeds must be \[any, any, 32\], got \[1, 4, 9\]",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(0, 4, 32)},
            r"prompt_embeds must hold at least one prompt, got \[0, 4, 32\]",
        ),
        ({"prompt": "a \ud800"}, "the prompt .* is not UTF-8 at character 3"),
        ({"image": np.zeros((16, 32, 3), np.float32)}, r"image must be .* or a path, got float32 \[16, 32, 3\]"),
        ({"attention_kwargs": {"scale": 1}}, r"attention_kwargs must be None \(no processors of diffusers run\), got "),
        ({"guidance_scale_2": 3.0}, r"guidance_scale_2 must be None \(a distilled network\), got 3.0"),
        ({"height": 20}, "height must be a multiple of 16 pixels, got 20, nearest 16 or 32"),
        ({"num_frames": 20}, "num_frames must fill whole blocks of 3 latent frames: got 20, nearest 9 or 21"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000, got 0"),
        ({"guidance_scale": 5.0}, r"guidance_scale must be at most 1 \(a distilled network\), got 5.0"),
        ({"negative_prompt": "blur"}, "negative_prompt must be None"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be a whole number of at least 1, got 0"),
        ({"output_type": "gif"}, "output_type must be one of np, pt, pil, latent, got 'gif'"),
        ({"latents": torch.zeros(1, 16, 6, 2, 2)}, r"latents must be \[1, 16, 6, 2, 4\], got \[1, 16, 6, 2, 2\]"),
        ({"generator": [seeded(), seeded()]}, "generator must be one, or one for each of 1 videos, got 2"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise_pred"]},
            "callback_on_step_end_tensor_inputs must be one of latents, prompt_embeds, got 'noise_pred'",
        ),
        (
            {"generator": 7},
            r"generator must be a torch.Generator, .* got 7",
        ),
        ({"generator": np.random.default_rng(0)}, r"generator must be a torch.Generator.*, got Generator\(PCG64\)"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be at most 1 .*, got nan"),
        ({"max_sequence_length": 0}, "max_sequence_length must be a whole number of at least 1, got 0"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be callable, got 3"),
        ({"order": "reverse"}, "order must be one of step_first, stream, wavefront, block_first, got 'reverse'"),
    ],
)
def test_refused_before_work_starts(pipe, monkeypatch, options, message):
    monkeypatch.setattr(HiARTransformer, "run", None)
    with pytest.raises(ValueError, match=message):
        make(pipe, options.pop("prompt", PROMPT), **options)


def test_refused_components(folder, checkpoints, pipe, monkeypatch):
    parts = pipe.components
    with pytest.raises(ValueError, match="vae must be an AutoencoderKLWan, got AutoencoderTiny"):
        HiARPipeline(**{**parts, "vae": AutoencoderTiny()})
    with pytest.raises(ValueError, match="checkpoint .*hiar.pt and transformer exclude each other"):
        HiARPipeline.from_pretrained(folder, checkpoint=checkpoints / "hiar.pt", transformer=pipe.transformer)
    with pytest.raises(ValueError, match=r"no\.pt: no such file"):
        HiARPipeline.from_pretrained(folder, checkpoint=checkpoints / "no.pt")
    with pytest.raises(TypeError, match=r"^HiARPipeline\(\) takes no argument 'num_frame'; did you mean num_frames\?$"):
        pipe(PROMPT, num_frame=9)
    with pytest.raises(TypeError, match=r"^HiARPipeline.stream\(\) takes no argument 'eta'$"):
        pipe.stream(PROMPT, eta=0.0)
    own = HiARPipeline(**parts)
    own.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="scheduler must be a FlowMatchEulerDiscreteScheduler, got UniPC"):
        make(own)
