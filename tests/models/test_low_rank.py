"""LoRA beside the weights: the same numbers as merged, the model itself untouched, scales that change in a graph."""

from __future__ import annotations

import copy

import lora_files
import pytest
import torch
from made_runs import make_rollout
from recorder import Recorder
from tiny_model import MODEL, SIZE, TEXT, make_model

from hiar_model.config import FlowSchedule
from hiar_model.models.lora import merged, read_lora
from hiar_model.models.low_rank import Adapter, Adapters
from hiar_model.models.quantized_linear import quantized

pytestmark = pytest.mark.cpu

STATE = {key: value.clone() for key, value in MODEL.state_dict().items()}
MORE = {
    "diffusion_model.blocks.0.self_attn.k.diff_b": torch.full((16,), 0.25),
    "diffusion_model.blocks.0.self_attn.k.diff": torch.full((16, 16), 0.1),
    "diffusion_model.blocks.0.norm3.diff": torch.full((16,), 0.5),
    "diffusion_model.blocks.1.modulation.diff": torch.full((1, 6, 16), 0.2),
}


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    first = lora_files.write(folder, "ComfyUI", STATE, more=MORE, name="first")
    second = lora_files.write(folder, "kohya", STATE, {"blocks.0.self_attn.q": (3, 6.0)}, name="second")
    return [read_lora(first, STATE), read_lora(second, STATE)]


def by_hand(loras, *scales, dtype=torch.float32):
    """The model with the adapters merged."""
    model = copy.deepcopy(MODEL).to(dtype)
    model.load_state_dict(merged(STATE, list(zip(loras, scales, strict=True)), torch.float64))
    return model


def beside(loras, *scales, base=MODEL) -> Adapters:
    return Adapters([base], [Adapter(lora, lora.name, scale) for lora, scale in zip(loras, scales, strict=True)])


def forward(model):
    x = torch.randn(1, 3, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    weight = model.head.modulation
    return model(x.to(weight.dtype), torch.tensor([[1000.0, 500, 0]]), TEXT.to(weight.dtype))


def test_branches_are_the_merged_weights_and_leave_the_model_alone(loras):
    before = forward(MODEL)
    adapters = beside(loras, 0.5, -2.0)
    (model,) = adapters.transformers
    exact = forward(by_hand(loras, 0.5, -2.0, dtype=torch.float64)).float()
    assert (forward(model) - exact).abs().max() <= 2 * (forward(by_hand(loras, 0.5, -2.0)) - exact).abs().max() + 1e-6
    assert (exact - before).abs().max() > 0.1
    assert torch.equal(forward(MODEL), before) and all(torch.equal(v, STATE[k]) for k, v in MODEL.state_dict().items())
    assert model.state_dict().keys() == STATE.keys()
    shared = model.blocks[1].self_attn.qkv.weight
    assert shared.data_ptr() == MODEL.blocks[1].self_attn.qkv.weight.data_ptr()
    for adapter in adapters.adapters:
        adapter.scale = 0.0
    adapters.write()
    assert torch.equal(forward(model), before)


def test_experts_are_copied_once_each(loras):
    other = make_model(1)
    adapters = Adapters([MODEL, MODEL, None, other], [Adapter(loras[1], "a", 1.0)])
    first, again, none, last = adapters.transformers
    assert first is again and none is None and first is not MODEL
    assert not torch.equal(forward(last), forward(other)) and not torch.equal(forward(last), forward(first))


def switched(executor: str, model, change, steps: int = 2):
    """Latents of a video at whose second finished block ``change`` is called, and the rollout."""
    made = make_rollout(
        model, TEXT, FlowSchedule.uniform(steps), num_frames=15, order="stream", window_frames=6, executor=executor,
        **SIZE,
    )  # fmt: skip
    blocks = []
    for block in made:
        blocks.append(block.latents.clone())
        if block.block == 1:
            change()
            made.weights_changed()
    return torch.stack(blocks), made


@pytest.mark.parametrize("executor", ["eager", "recorded"])
def test_a_scale_changes_while_a_video_is_made_without_a_new_capture(loras, executor):
    adapters = beside(loras, 1.0, 0.5)
    (model,) = adapters.transformers

    def change() -> None:
        adapters.adapters[0].scale = -0.5
        adapters.write()

    latents, made = switched(executor, model, change)
    plain, constant = switched(executor, model, lambda: None)  # at the new scale from the start
    replaced = by_hand(loras, 1.0, 0.5)

    def overwrite() -> None:
        replaced.load_state_dict(merged(STATE, [(loras[0], -0.5), (loras[1], 0.5)]))

    want, _ = switched("eager", replaced, overwrite)
    assert made._executor.counters.captures == constant._executor.counters.captures
    assert (latents - want).abs().max() < 1e-4
    assert (want[2:] - switched("eager", by_hand(loras, 1.0, 0.5), lambda: None)[0][2:]).abs().max() > 0.05
    assert (plain[:2] - want[:2]).abs().max() > 0.05


def test_the_scale_is_read_by_the_recording_itself(loras):
    """Not only by what :meth:`Rollout.weights_changed` computes anew."""
    adapters = beside(loras[1:], 1.0)
    layer, x = adapters.transformers[0].blocks[0].self_attn.qkv, torch.ones(1, 4, 16)
    out = torch.zeros(1, 4, 48)
    with torch.no_grad():
        recording = Recorder.capture(lambda: out.copy_(layer(x)))
        adapters.adapters[0].scale = 3.0
        adapters.write()
        recording.replay()
        assert torch.equal(out, layer(x))


@pytest.mark.parametrize("executor", ["eager", "recorded"])
def test_what_was_computed_ahead_follows_the_scale(loras, executor):
    """Modulation, and keys and values of the prompt: a change before the first block is as if it had always been so."""
    adapters = beside(loras[:1], 1.0)
    options = {"num_frames": 12, "order": "wavefront", "window_frames": 6, **SIZE}
    schedule, texts = FlowSchedule.uniform(4), (TEXT, TEXT + 1)
    made = make_rollout(adapters.transformers[0], lambda n: texts[n % 2], schedule, executor=executor, **options)
    made.warm_up()
    assert made._executor.prompt_cache.stacked, "prompts that one forward reads side by side"
    adapters.adapters[0].scale = -0.5
    adapters.write()
    made.weights_changed()
    assert not made._executor.prompt_cache.stacked
    latents = torch.cat([block.latents for block in made], 1)
    fresh = make_rollout(by_hand(loras[:1], -0.5), lambda n: texts[n % 2], schedule, executor="eager", **options)
    assert (latents - torch.cat([block.latents for block in fresh], 1)).abs().max() < 1e-4


def test_beside_linear_layers_in_8_bits(tmp_path):
    """The branch reads its input in full and follows its scale; the error is that of the layers alone."""
    files = [
        lora_files.write(tmp_path, dialect, STATE, name=name) for dialect, name in (("diffusers", "a"), ("kohya", "b"))
    ]
    loras = [read_lora(file, STATE) for file in files]
    adapters = beside(loras, 0.5, 1.0)
    twin = quantized(adapters.transformers[0])
    for scales in ((0.5, 1.0), (2.0, 0.0)):
        for adapter, scale in zip(adapters.adapters, scales, strict=True):
            adapter.scale = scale
        adapters.write()
        expected = forward(by_hand(loras, *scales))
        alone = (forward(quantized(MODEL)) - forward(MODEL)).square().mean().sqrt()
        error = (forward(twin) - expected).square().mean().sqrt()
        assert float(error) < 3 * float(alone)
        assert float((expected - forward(MODEL)).square().mean().sqrt()) > 5 * float(alone)


def test_a_full_difference_of_a_layer_in_8_bits_is_refused(tmp_path):
    more = {"diffusion_model.blocks.1.ffn.0.diff": torch.full((32, 16), 0.1)}
    lora = read_lora(lora_files.write(tmp_path, "ComfyUI", STATE, more=more, name="full"), STATE)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.0\.weight.*convert --lora"):
        quantized(beside([lora], 1.0).transformers[0])
