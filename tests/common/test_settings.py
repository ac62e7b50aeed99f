"""What a program has set for itself changes nothing that we make: same bits, and its own settings again behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import wan_files
from taehv_weights import taehv_state
from test_ops import SAMPLES, op
from tiny_model import MODEL, TEXT, run
from torch import Tensor

import hiar_model
from hiar_kernels import attention
from hiar_model.common.settings import PINNED, own_settings
from hiar_model.config import FlowSchedule
from hiar_model.models.small_stream import SmallDecoder, SmallEncoder
from hiar_model.models.small_vae import SmallVAE
from hiar_model.models.text_encoder import WanTextEncoder
from hiar_model.models.vae import StreamingDecoder, StreamingEncoder, load_vae
from hiar_model.rollout.infill import infill
from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.oracle import ToyOracle
from hiar_model.toy.prompt import all_prompts, split_prompts
from hiar_model.toy.world import WORLDS, ToyWorld
from hiar_model.train import trajectory_x0
from hiar_model.train.engine.networks import make_network

pytestmark = pytest.mark.cpu
E4M3 = "float8_e4m3fn"


@contextmanager
def setting(change: Callable[[], object], back: Callable[[], object]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        back()


def default(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(lambda: torch.set_default_dtype(dtype), lambda: torch.set_default_dtype(torch.float32))


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": lambda: default(torch.float64),
    "bfloat16": lambda: default(torch.bfloat16),
    "device": lambda: torch.device("meta"),  # stands for a GPU
    "default device": lambda: setting(lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: setting(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
    "precision": lambda: setting(
        lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")
    ),
}


def standing() -> tuple[object, ...]:
    """The settings as they are."""
    return (
        torch.get_default_dtype(), torch.empty(0).device, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), *(getattr(owner, name) for owner, name, _ in PINNED),
    )  # fmt: skip


def video() -> list[Tensor]:
    result = hiar_model.generate("a red circle moving right", num_frames=12, steps=2, seed=5)
    return [torch.from_numpy(result.frames)]


def world() -> list[Tensor]:
    """Scenes, codec, words, and what the oracle reads."""
    config = WORLDS["varied"]
    frames = ToyWorld(config).sample_batch(2, 6, torch.Generator().manual_seed(0)).videos
    codec = ToyCodec.fit(channels=8, frames=64)
    shown = codec.decode(codec.encode(frames))
    read = ToyOracle(config).evaluate(codec.to_uint8(shown)[0], all_prompts()[0])
    _, held_out = split_prompts(8)
    tokens = torch.tensor([prompt.tokens() for prompt in held_out], device="cpu")
    return [frames, shown, read.centres, read.velocity, tokens, *codec.state_dict().values()]


def fill() -> list[Tensor]:
    clean = torch.zeros(1, 6, 2, 2, 4, dtype=torch.float32, device="cpu")
    return [infill(MODEL, clean, [0], TEXT, FlowSchedule.uniform(2))]


MADE: dict[str, Callable[[], list[Tensor]]] = {
    "generate": video,
    "rollout": lambda: [run(order=order, window_frames=6, seed=3) for order in ("stream", "block_first")],
    "8 bits": lambda: [
        run(
            order="stream",
            window_frames=6,
            seed=3,
            cache_dtype=torch.float8_e4m3fn,
            attention_dtype=E4M3,
            linear_dtype=E4M3,
        )
    ],
    "infill": fill,
    "toy world": world,
    "weights": lambda: list(make_network("toy", seed=3).state_dict().values()),
}
EXPECTED: dict[str, list[Tensor]] = {}


def require_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape), i
        assert a.equal(b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num())), i


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_we_make(name, kind):
    if kind not in EXPECTED:
        EXPECTED[kind] = MADE[kind]()
    with SETTINGS[name]():
        before = standing()
        actual = MADE[kind]()
        assert standing() == before
    require_same(actual, EXPECTED[kind])


def parts(folder: Path) -> list[Tensor]:
    """What a program may use of Wan by itself: text encoder, VAEs, targets of the forward KL."""
    vae, small = load_vae(folder), SmallVAE()
    small.load_state_dict(taehv_state(), assign=True)
    words = WanTextEncoder(folder)
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 5, 3, 16, 32)).astype(np.float32))
    latents = StreamingEncoder(vae).encode(pixels)
    level, following = (torch.tensor([sigma], dtype=torch.float64, device="cpu") for sigma in (0.9, 0.8))
    return [
        words("a red circle"), latents, torch.from_numpy(StreamingDecoder(vae).decode(latents)),
        StreamingDecoder(vae).decode_float(latents), SmallEncoder(small).encode(pixels),
        SmallDecoder(small).decode_float(latents), trajectory_x0(latents, 2 * latents, 0.9, 0.8),
        trajectory_x0(latents, 2 * latents, level, following),
    ]  # fmt: skip


def test_parts_by_themselves_under_all_settings_at_once(tmp_path):
    folder = wan_files.write_diffusers(tmp_path / "wan")
    expected = parts(folder)
    with ExitStack() as stack:
        for setting in SETTINGS.values():
            stack.enter_context(setting())
        before = standing()
        actual = parts(folder)
        assert standing() == before
    require_same(actual, expected)


def flat(x: object) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [y for part in x for y in flat(part)] if isinstance(x, list | tuple) else []


def outcome(sample: str, context: AbstractContextManager[object], trains: bool) -> list[Tensor]:
    """Outputs, what is written into arguments, and gradients."""

    def copied(x: object) -> object:
        if isinstance(x, list) and x and isinstance(x[0], Tensor):
            return [copied(y) for y in x]
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)

    arguments = [copied(x) for x in SAMPLES[sample]]
    with context:
        outs = flat(op(sample)(*arguments))
    trained, leaves = [y for y in outs if y.requires_grad], [x for x in flat(arguments) if x.requires_grad]
    grads: list[Tensor] = []
    if trains and trained:
        ones = [torch.ones_like(y) for y in trained]
        grads = [g for g in torch.autograd.grad(trained, leaves, ones, allow_unused=True) if g is not None]
    return [*outs, *flat(arguments), *grads]


@pytest.mark.parametrize("sample", [name for name in SAMPLES if not name.split()[0].endswith("_cuda")])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_op(name, sample):
    trains = name not in ("no_grad", "inference_mode")
    plain = outcome(sample, own_settings(), trains)
    actual = outcome(sample, SETTINGS[name](), trains)
    require_same([x.detach().clone() for x in actual], [x.detach().clone() for x in plain])


@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("name", ["autocast", "precision"])
def test_attention_of_a_size_that_rough_products_show_in(name, impl):
    """1e-3 apart where float32 products are made of bfloat16, on a processor that has such instructions."""
    q, k, v = (torch.randn(1, 256, 2, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    plain = attention(q, k, v, impl=impl)
    with SETTINGS[name]():
        assert torch.equal(attention(q, k, v, impl=impl), plain)
        assert torch.equal(
            torch.ops.hiar.attention(q, k, v, *[None] * 6, [], [], 0.125)[0], attention(q, k, v, impl="reference")
        )
