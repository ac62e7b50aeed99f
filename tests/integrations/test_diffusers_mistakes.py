"""HiARPipeline in the hands of a diffusers user: wrong arguments get one line, odd but legal ones work, and changes of
the weights count.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lora_files
import numpy as np
import pytest
import torch
import wan_files
from diffusers import DiffusionPipeline
from hiar_pipelines import hiar_pipe, load, quiet, seeded, wan_folder  # noqa: F401
from PIL import Image

from hiar_model import ExecutionConfig, RolloutConfig
from hiar_model.integrations.diffusers import HiARPipeline
from hiar_model.integrations.diffusers.network import SharedNetwork
from hiar_model.integrations.diffusers.options import log, read_image

pytestmark = pytest.mark.cpu

PROMPT = wan_files.PROMPT
SMALL = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 1, "output_type": "latent"}
EIGHT_BITS = ExecutionConfig(linear_dtype="float8_e4m3fn")


def make(pipe: HiARPipeline, prompt: Any = PROMPT, **options: Any) -> torch.Tensor:
    return pipe(prompt, **{**SMALL, "generator": seeded(), **options}).frames


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": None}, "guidance_scale must be at most 1 .*got None"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be at most 1 .*got nan"),
        ({"max_sequence_length": 0}, "max_sequence_length must be a whole number of at least 1, got 0"),
        ({"max_sequence_length": 600}, "max_sequence_length must be a whole number from 1 to 512, got 600"),
        ({"generator": 3}, "generator must be a torch.Generator, or a list of them, got 3"),
        ({"generator": [3]}, "generator must be a torch.Generator, or a list of them, got 3"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be callable, got 3"),
        ({"rollout": {"stepz": [500]}}, "RolloutConfig: unknown stepz; known: steps,"),
        ({"rollout": "fast"}, "rollout must be a RolloutConfig, or a mapping of its fields, got 'fast'"),
        ({"image": Image.new("RGB", (0, 0)), "num_frames": 13}, "image must have pixels, got 0x0"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(4, 32)},
            r"prompt_embeds must be \[any, any, 32\], got \[4, 32\]",
        ),
    ],
)
def test_wrong_arguments(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        make(pipe, options.pop("prompt", PROMPT), **options)


def alike(mode: str) -> Image.Image:
    """Green under alpha 0 on the left, (200, 100, 50) or 100 on the right."""
    cut_out = np.zeros((16, 16, 4), np.uint8)
    cut_out[..., 1], cut_out[:, 8:] = 255, (200, 100, 50, 255)
    if mode.startswith("I"):
        grey = np.full((16, 16), 100 * 257, ">u2" if mode == "I;16B" else np.uint16)
        return Image.frombytes(mode, (16, 16), grey.astype(np.int32 if mode == "I" else grey.dtype).tobytes())
    image = Image.fromarray(cut_out)
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "PA", "RGBa", "La", "I", "I;16", "I;16B"])
def test_pictures_of_every_mode_are_taken_as_they_look(mode):
    (frame,) = read_image(alike(mode), (16, 16)).frames
    assert frame[2, 2].tolist() == [100 if mode.startswith("I") else 255] * 3
    assert abs(frame[2, 12, 1] - (124 if mode == "La" else 100)) < 3


def test_changes_to_a_picture_are_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(log, "warning", lines.append)
    read_image(Image.new("RGB", (16, 16)), (16, 16))
    assert not lines
    read_image(Image.new("RGBA", (16, 16)), (16, 16))
    assert lines == ["image: transparent parts are put on white"]


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting",
    [
        lambda: default(torch.float64),
        lambda: default(torch.bfloat16),
        lambda: torch.device("meta"),  # stands for a GPU
        torch.inference_mode,
    ],
    ids=["float64", "bfloat16", "device", "inference_mode"],
)
def test_what_the_program_has_set_changes_nothing_that_is_loaded(pipe, folder, setting):
    """diffusers' own loader follows torch's defaults: the VAE came in bfloat16."""
    with setting():
        again = load(folder)
    for part in ("text_encoder", "vae", "transformer"):
        plain, loaded = (getattr(one, part).state_dict() for one in (pipe, again))
        assert plain.keys() == loaded.keys()
        for name, value in plain.items():
            assert (value.dtype, value.device) == (loaded[name].dtype, loaded[name].device), (part, name)
            assert torch.equal(value, loaded[name]), (part, name)
    assert torch.equal(make(pipe), make(again))


def test_odd_but_legal(pipe):
    plain = make(pipe)
    seen: list[dict[str, Any]] = []

    def note(own: Any, step: int, timestep: Any, values: dict[str, Any]) -> None:
        seen.append(values)

    for names in (None, "latents"):
        options: dict[str, Any] = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names}
        assert float((make(pipe, **options) - plain).abs().max()) < 1e-4
    assert [set(values) for values in seen] == [set(), {"latents"}]
    assert torch.equal(make(pipe, rollout=pipe.rollout.to_dict()), plain)
    assert torch.equal(make(pipe, height=np.int64(16), prompt=(PROMPT,)), plain)


def test_an_encoder_that_fails_is_no_empty_prompt(pipe):
    """UMT5 overflows in float16. NaN was taken for padding, and the video had no prompt."""
    embeds, _ = pipe.encode_prompt(PROMPT)
    for wrong in (embeds * torch.nan, torch.cat([embeds, embeds[:, :1] * torch.nan], 1)):
        with pytest.raises(FloatingPointError, match="not finite from step 0 of block 0 on: the prompt's keys"):
            make(pipe, None, prompt_embeds=wrong)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda x: {"latents": x[:, :, :1]},
            r"latents from callback_on_step_end must be \[2, 16, 3, 2, 2\], got \[2, 16, 1",
        ),
        (lambda x: {"latents": x[:1]}, r"latents from callback_on_step_end must be \[2, 16, 3, 2, 2\], got \[1, 16"),
        (lambda x: {"latents": None}, "latents from callback_on_step_end must be a tensor .*got NoneType"),
        (lambda x: {"prompt_embeds": x}, r"prompt_embeds from callback_on_step_end must be \[1 or 2, "),
        (lambda x: x, "callback_on_step_end must return a mapping of latents, prompt_embeds, got Tensor"),
    ],
)
def test_what_a_callback_returns_is_checked(pipe, returned, message):
    """A tensor that broadcasts would fill a block with copies of one frame or one video."""
    with pytest.raises(ValueError, match=message):
        make(pipe, [PROMPT, "x"], callback_on_step_end=lambda own, step, timestep, values: returned(values["latents"]))


def test_a_callback_cannot_change_embeddings_by_the_way(pipe):
    def spoil(own: Any, step: int, timestep: Any, values: dict[str, Any]) -> None:
        values["prompt_embeds"].mul_(0)

    options: dict[str, Any] = {"num_frames": 21, "order": "stream"}
    names = {"callback_on_step_end": spoil, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert torch.equal(make(pipe, **names, **options), make(pipe, **options))


def test_wrong_parts(folder, pipe, tmp_path):
    parts = pipe.components
    for options, message in (
        ({"execution": {"kv_dtype": "float8_e4m3fn"}}, "execution must be an ExecutionConfig, got {'kv_dtype"),
        ({"rollout": 3}, "rollout must be a RolloutConfig, or a mapping of its fields, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            HiARPipeline(**parts, **options)
    own = HiARPipeline(**parts)
    own.rollout = {"steps": [1000, 500]}
    assert own.rollout == RolloutConfig(steps=(1000, 500))
    own.rollout = None
    assert own.rollout == pipe.rollout
    with pytest.raises(ValueError, match="rollout must be a RolloutConfig"):
        own.rollout = "fast"
    embeds, _ = pipe.encode_prompt(PROMPT)
    without = load(folder, text_encoder=None, tokenizer=None)
    assert torch.equal(make(without, None, prompt_embeds=embeds), make(pipe))
    with pytest.raises(ValueError, match="text_encoder is None: without it, give prompt_embeds"):
        make(without)
    native = wan_files.write_original(tmp_path / "native", parts=False)
    for path, options, message in (
        (
            folder,
            {"torch_dtype": "bfloat16"},
            "torch_dtype must be a torch.dtype, such as torch.bfloat16, got 'bfloat16'",
        ),
        (folder, {"dtype": {"vae": "auto"}}, "dtype must be a torch.dtype, .* got 'auto'"),
        (folder, {"checkpoint": 3}, "checkpoint must be the path of a file or folder, got 3"),
        (folder, {"checkpoint": folder / "vae" / f"{wan_files.WEIGHTS}.safetensors"}, "makes it a VAE; expected a tr"),
        (folder, {"checkpoint": folder / "text_encoder" / "model.safetensors"}, "makes it a text encoder; expected"),
        (tmp_path / "nowhere", {}, "nowhere: no such folder"),
        (folder / "model_index.json", {}, "model_index.json: no such folder"),
        (native, {}, "native: no model_index.json: expected a pipeline folder.*load_video_model"),
    ):
        with pytest.raises(ValueError, match=message):
            HiARPipeline.from_pretrained(path, **options)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="save_directory .*file is a file, expected a folder"):
        pipe.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saved_without_safetensors(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "bin", safe_serialization=False)
    pipe.transformer.save_pretrained(tmp_path / "parts", safe_serialization=False, max_shard_size="2MB")
    assert len(list((tmp_path / "parts").glob("*.bin"))) > 2
    plain = make(pipe)
    assert torch.equal(make(load(tmp_path / "bin")), plain)
    assert torch.equal(make(load(tmp_path / "bin", checkpoint=tmp_path / "parts")), plain)


def test_loaded_by_its_class_name(pipe, tmp_path):
    """Once hiar_model.integrations.diffusers is imported."""
    pipe.save_pretrained(tmp_path / "new")
    reloaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "new"))
    assert type(reloaded) is HiARPipeline and torch.equal(make(reloaded), make(pipe))


# Weights that PEFT writes to past torch's count of versions


@pytest.mark.parametrize("execution", [None, EIGHT_BITS], ids=["plain", "8 bits"])
def test_fused_lora_counts(folder, tmp_path, execution):
    pipe = load(folder)
    pipe.execution = execution
    before = make(pipe)
    file = lora_files.write(tmp_path, "diffusers", wan_files.native_state(), lora_files.ALL_OF_BLOCKS)
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = make(pipe)
    parts = {**pipe.components, "transformer": copy.deepcopy(pipe.transformer)}
    fresh = quiet(HiARPipeline(**parts, execution=execution))
    assert torch.equal(fused, make(fresh)) and float((fused - before).abs().max()) > 0.1


def test_copies_of_float32_weights_follow(folder):
    """Of the weights that diffusers keeps in float32 the network has copies."""
    pipe, shared = load(folder, dtype=torch.bfloat16), SharedNetwork()
    network = shared.of(pipe.transformer)
    norm = pipe.transformer.blocks[0].norm2.weight
    norm.data.mul_(2)
    assert shared.of(pipe.transformer) is network
    assert torch.equal(network.blocks[0].norm3.weight, norm.to(torch.bfloat16))


def test_a_folder_of_both_forms(folder, tmp_path):
    """Hubs hold the older form beside .safetensors: it is not read then."""
    shutil.copytree(folder / "transformer", tmp_path / "both")
    (tmp_path / "both" / f"{wan_files.WEIGHTS}.bin").write_bytes(b"older")
    assert make(load(folder, checkpoint=tmp_path / "both")).shape[2] == 3


def test_refused_weights(folder, monkeypatch):
    monkeypatch.setattr(HiARPipeline, "encode_prompt", None)  # refused before work starts
    pipe = load(folder)
    attn = pipe.transformer.blocks[1].attn1
    linear = attn.to_q
    attn.to_q = torch.nn.ModuleDict({"base_layer": linear, "lora_A": torch.nn.Linear(2, 2)})  # as PEFT names them
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attn1\.to_q\.base_layer\.\w+: a LoRA beside .* fuse_lora\(\), then"
    ):
        make(pipe)
    attn.to_q = linear.to("meta")
    with pytest.raises(ValueError, match=r"attn1\.to_q\.weight is not in memory: enable_model_cpu_offload\(\) keeps"):
        make(pipe)
    attn.to_q = torch.nn.Linear(256, 256).to(torch.float8_e4m3fn)
    with pytest.raises(
        ValueError, match=r"attn1\.to_q\.weight is torch\.float8_e4m3fn: quantised weights are not read"
    ):
        make(pipe)
    attn.to_q = linear.to_empty(device="cpu")
    pipe.transformer.blocks.append(copy.deepcopy(pipe.transformer.blocks[0]))
    with pytest.raises(ValueError, match=r"transformer: unexpected blocks\.2\.attn1\.norm_k\.weight, blocks\.2\.\S+, "):
        make(pipe)
    del pipe.transformer.blocks[2]
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"projections are fused; call transformer\.unfuse_qkv_projections\(\)"):
        make(pipe)
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="with group offload its weights come layer by layer"):
        make(pipe)
