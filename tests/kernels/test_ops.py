"""The ops as torch sees them: schemas, fakes and gradients, torch.compile, and the choice of an implementation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hiar_kernels as hk
from hiar_kernels import BlockCausal, KVContext
from hiar_kernels.attention.inputs import AttentionInputs
from hiar_kernels.common import pointwise, triton_loader
from hiar_kernels.common.float8 import E4M3

pytestmark = pytest.mark.cpu


def normal(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def turned(x: Tensor) -> Tensor:
    """The same values in another order of memory."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(x.requires_grad)


def channels_last(x: Tensor) -> Tensor:
    """The same values with all channels of a pixel beside each other."""
    return x.detach().to(memory_format=torch.channels_last_3d).requires_grad_(x.requires_grad)


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)


def fp8_rings(rows: int) -> tuple[Tensor, ...]:
    """Of 4 slots, 3 tokens, 2 heads of 4: caches as bytes, and scales."""
    k, v = torch.zeros(rows, 12, 2, 4, dtype=torch.uint8), torch.zeros(rows, 4, 2, 4, 16, dtype=torch.uint8)
    return k, v, torch.ones(rows, 4, 2), torch.ones(rows, 4, 2)


# Schemas, fakes, gradients

ROPE = (2, 1, 3, 1e-6, 10000.0)
RING = ids([4, -1, 2, 3], [-1, 0, 1, 2])
BYTES = (torch.arange(2 * 6 * 2 * 4 * 16) % 120).to(torch.uint8).view(2, -1)  # of e4m3, none of them NaN
SAMPLES: dict[str, tuple[object, ...]] = {
    "attention": (normal(2, 5, 2, 4), normal(2, 7, 2, 4), normal(2, 7, 2, 4), *[None] * 6, [], [], 0.5),
    "attention of strided views": (
        turned(normal(2, 5, 2, 4)), turned(normal(2, 7, 2, 4)), normal(2, 7, 2, 4), *[None] * 6, [], [], 0.5,
    ),
    "attention with counts": (
        normal(2, 5, 2, 4), normal(2, 3, 2, 4), normal(2, 3, 2, 4), *[None] * 5, torch.tensor([[1.0, 0.0, 9.0]]),
        [], [], 0.5,
    ),
    "attention over a ring": (
        normal(2, 4, 2, 4), normal(2, 8, 2, 4), normal(2, 8, 2, 4), None, None, ids([3, 4], [1, 2]), RING, None, None,
        [2, 2, 0, 0, 2], [3, -1], 0.5,
    ),
    "attention beside a context": (
        normal(2, 8, 2, 4), normal(2, 8, 2, 4), normal(2, 8, 2, 4), normal(2, 8, 2, 4), normal(2, 8, 2, 4),
        None, None, RING, None, [2, 2, 1, 0, 1], [4, 4], 0.5,
    ),
    "attention_eager": (
        normal(2, 5, 2, 4), normal(2, 3, 2, 4), normal(2, 3, 2, 4), *[None] * 5, torch.tensor([[1.0, 0.0, 9.0]]),
        [], [], None, "sdpa", 0, False,
    ),
    "attention_eager over a ring": (
        turned(normal(2, 4, 2, 4)), normal(2, 8, 2, 4), normal(2, 8, 2, 4), None, None, ids([3, 4], [1, 2]), RING, None,
        None, [2, 2, 0, 0, 2], [3, -1], 0.5, "auto", 0, False,
    ),
    "attention_eager beside a context, with a logsumexp": (
        normal(2, 8, 2, 4), normal(2, 8, 2, 4), normal(2, 8, 2, 4), normal(2, 8, 2, 4), normal(2, 8, 2, 4),
        None, None, RING, None, [2, 2, 1, 0, 1], [4, 4], 0.5, "reference", 0, True,
    ),
    "attention_fp8": (
        normal(2, 4, 2, 4, grad=False), BYTES[:, :96].unflatten(1, (12, 2, 4)), BYTES.unflatten(1, (6, 2, 4, 16)),
        *[torch.ones(2, 6, 2)] * 2, None, ids([3, 4], [1, 2]), ids([3, 4, -1, 2, 0, 1]), [2, 2, 0, 0, 2], [3, -1], 0.5,
        torch.float32,
    ),
    "attention_fp8 of 8-bit queries": (
        BYTES[:, :32].unflatten(1, (4, 2, 4)), BYTES[:, :96].unflatten(1, (12, 2, 4)),
        BYTES.unflatten(1, (6, 2, 4, 16)),
        *[torch.ones(2, 6, 2)] * 2, torch.ones(2, 4, 2), ids([3, 4], [1, 2]), ids([3, 4, -1, 2, 0, 1]),
        [2, 2, 0, 0, 2], [3, -1], 0.5, torch.bfloat16,
    ),
    "merge_attention": ([normal(2, 5, 2, 4, grad=False)] * 2, [normal(2, 2, 5, grad=False)] * 2),
    "qk_norm_rope": (normal(2, 6, 24), normal(8), normal(8), ids([0, 9]), *ROPE),
    "qk_norm_rope of some cells": (normal(2, 4, 24), normal(8), normal(8), ids([0, 9]), *ROPE, [1, 3]),
    "qk_norm_rope_append": (
        normal(2, 6, 24, grad=False), normal(8, grad=False), normal(8, grad=False), ids([0, 9]), ids([2, 0], [1, 3]),
        normal(4, 12, 2, 4, grad=False)[::2], normal(2, 12, 2, 4, grad=False), *ROPE,
    ),
    "qk_norm_rope_append to two rings": (
        normal(2, 6, 24, grad=False), normal(8, grad=False), normal(8, grad=False), ids([0, 9]),
        torch.stack([ids([2, 0], [1, 3]), ids([1, 3], [0, 2])]), normal(4, 12, 2, 4, grad=False)[::2],
        normal(2, 12, 2, 4, grad=False), *ROPE, None, ids([1, 0], [-1, 1]),
    ),
    "append_fp8": (*[normal(2, 6, 2, 4, grad=False)] * 2, ids([2, 0], [1, 3]), *fp8_rings(2)),
    "append_fp8 of strided keys": (turned(normal(2, 6, 2, 4)).detach(),) * 2 + (ids([2, 0]), *fp8_rings(2)),
    "qk_norm_rope_append_fp8": (
        normal(2, 6, 24, grad=False), normal(8, grad=False), normal(8, grad=False), ids([0, 9]), ids([2, 0], [1, 3]),
        *fp8_rings(2), *ROPE, False,
    ),
    "qk_norm_rope_append_fp8 to two rings, q too": (
        normal(2, 6, 24, grad=False), normal(8, grad=False), normal(8, grad=False), ids([0, 9]),
        torch.stack([ids([2, 0], [1, 3]), ids([1, 3], [0, 2])]), *fp8_rings(3), *ROPE, True, ids([1, 0], [-1, 2]),
    ),
    "ring_advance": (
        ids([0, 4])[0], ids([0, 0], [0, 0]), ids([0, 0], [0, 0]), ids(*[[-1] * 9] * 2)[:, :7], ids([0, 2])[0],
        ids([7, 4])[0], 10, 1,
    ),
    "ada_layer_norm": (normal(2, 6, 8), normal(2, 3, 8), normal(1, 3, 8).expand(2, 3, 8), 1e-6),
    "ada_layer_norm of strided views": (turned(normal(2, 6, 8)), turned(normal(2, 3, 8)), normal(2, 3, 8), 1e-6),
    "layer_norm": (normal(2, 6, 8), normal(8), normal(8), 1e-6),
    "layer_norm of strided views": (turned(normal(2, 6, 8)), normal(8), normal(8), 1e-6),
    "gated_residual": (normal(2, 6, 8), normal(2, 6, 8), normal(1, 2, 8)),
    "gated_residual_ada_layer_norm": (
        normal(2, 6, 8), normal(2, 6, 8), normal(2, 3, 8), normal(1, 3, 8), normal(1, 3, 8), 1e-6,
    ),
    "gated_residual_ada_layer_norm without a gate": (
        normal(2, 6, 8), normal(2, 6, 8), None, normal(1, 3, 8), normal(1, 3, 8), 1e-6,
    ),
    "gated_residual_layer_norm": (normal(2, 6, 8), normal(2, 6, 8), normal(2, 3, 8), normal(8), normal(8), 1e-6),
    "rms_norm": (normal(2, 6, 8), normal(8), 1e-6),
    "rms_norm of strided views": (turned(normal(2, 6, 8)), normal(8), 1e-6),
    "gated_residual of strided views": (turned(normal(2, 6, 8)), turned(normal(2, 6, 8)), normal(1, 2, 8)),
    "flow_step": (
        normal(2, 3, 2, 4, 4), normal(2, 3, 2, 4, 4), torch.rand(1, 3), torch.rand(2, 1), normal(2, 3, 2, 4, 4),
    ),
    "flow_step without noise": (
        normal(2, 3, 2, 4, 4), normal(2, 3, 2, 4, 4), torch.rand(1, 1), torch.zeros(1, 1), None,
    ),
    "flow_step of strided views": (
        turned(normal(2, 3, 2, 4, 4)), turned(normal(2, 3, 2, 4, 4)), torch.rand(1, 1), torch.rand(1, 1), None,
    ),
    "rms_silu_pad": (normal(2, 6, 3, 2, 4), normal(6), normal(2, 6, 2, 2, 4), 1e-12),
    "rms_silu_pad at the start": (normal(2, 6, 1, 2, 4), normal(6), None, 1e-12),
    "rms_silu_pad of channels last": (channels_last(normal(2, 6, 3, 2, 4)), normal(6), normal(2, 6, 1, 2, 4), 1e-12),
    "quantize_rows": (normal(2, 6, 8, grad=False), None, E4M3),
    "quantize_rows of a GELU": (turned(normal(2, 6, 8)).detach(), "gelu_tanh", torch.int8),
    "int8_linear": (
        int8(2, 3, 8), torch.rand(2, 3), int8(4, 8), torch.rand(4), torch.zeros(4, dtype=torch.bfloat16),
    ),
    "ada_layer_norm_quantized": (normal(2, 6, 8, grad=False), *[normal(2, 3, 8, grad=False)] * 2, 1e-6, E4M3),
    "gated_residual_ada_layer_norm_quantized": (
        *[normal(2, 6, 8, grad=False)] * 2, *[normal(2, 3, 8, grad=False)] * 3, 1e-6, torch.int8,
    ),
}  # fmt: skip
TWICE = {
    f"{name}_cuda": name
    for name in ("merge_attention", "qk_norm_rope_append", "qk_norm_rope_append_fp8", "ring_advance")
}
SAMPLES |= {twin: SAMPLES[name] for twin, name in TWICE.items()}
NO_GRADIENT = (
    *TWICE,
    *TWICE.values(),
    "append_fp8",
    "attention_fp8",
    "quantize_rows",
    "int8_linear",
    "ada_layer_norm_quantized",
    "gated_residual_ada_layer_norm_quantized",
)


def op(sample: str) -> Callable:
    return getattr(torch.ops.hiar, sample.split()[0]).default


def test_every_op_has_a_sample():
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    defined = {name for library, name in names if library == "hiar"}
    forward = {name for name in defined if not name.endswith("_backward")}
    assert forward == {sample.split()[0] for sample in SAMPLES}
    assert {name.removesuffix("_backward") for name in defined - forward} == forward - set(NO_GRADIENT)


def cast(arguments: Iterable[object], dtype: torch.dtype) -> tuple[object, ...]:
    """The arguments with their floating-point tensors in the dtype, in the same order of memory."""

    def one(x: object) -> object:
        if isinstance(x, list) and x and isinstance(x[0], Tensor):
            return [one(y) for y in x]
        if not isinstance(x, Tensor) or not x.is_floating_point() or bool((x == 1).all()):  # scales stay float32
            return x
        storage = torch.empty_like(x, dtype=dtype) if x._base is None else None
        copy = x.detach().to(dtype) if storage is None else storage.copy_(x.detach())
        return copy.requires_grad_(x.requires_grad)

    return tuple(map(one, arguments))


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(sample, dtype):
    """Schema, autograd registration, fake against real outputs (strides too); in float32, tracing through AOTAutograd,
    which takes the most time and to which a dtype is nothing of its own.
    """
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    more = {} if dtype == torch.float32 else {"test_utils": checks[:3]}
    torch.library.opcheck(op(sample), cast(SAMPLES[sample], dtype), **more)


@pytest.mark.parametrize("sample", SAMPLES)
def test_fakes_have_the_strides_of_the_outputs(sample):
    def each(f: Callable[[Tensor], Tensor], x: object) -> object:
        return [each(f, y) for y in x] if isinstance(x, list) else f(x) if isinstance(x, Tensor) else x

    mode = FakeTensorMode()
    plain = [each(Tensor.detach, x) for x in SAMPLES[sample]]
    fakes = [each(mode.from_tensor, x) for x in plain]
    real = op(sample)(*(each(Tensor.clone, x) for x in plain))
    with mode:
        fake = op(sample)(*fakes)
    for a, b in zip(*([x] if isinstance(x, Tensor) else x or [] for x in (real, fake))):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


EACH = (0, 1, 2, 3, 4)  # positions; of ops that are not named the first three
DIFFERENTIABLE = {"attention": EACH, "attention_eager": EACH, "flow_step": (0, 1, 4), "rms_norm": (0, 1)}
DIFFERENTIABLE |= dict.fromkeys(("gated_residual_ada_layer_norm", "gated_residual_layer_norm"), EACH)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.split()[0] not in NO_GRADIENT])
def test_backward_ops(sample):
    """The backward is an op of its own, with a fake of the right strides; and it computes what torch derives."""
    arguments = SAMPLES[sample]
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    outs = op(sample)(*arguments)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    grads = [normal(*out.shape, seed=5 + i, grad=False) for i, out in enumerate(outs)]
    found = torch.autograd.grad(outs, wanted, grads)
    name = sample.split()[0]
    backward = getattr(torch.ops.hiar, f"{name}_backward").default
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    given = [arguments[i] for i in DIFFERENTIABLE.get(name, (0, 1, 2)) if arguments[i] is not None]
    assert len(given) == len(wanted)
    kept = [[out.detach() for out in outs]] if name == "attention" else []
    for needed in ([True] * len(given), [i != 1 for i in range(len(given))]):
        results = backward(grads, needed, *kept, *plain)
        assert len(results) == sum(needed)
        for a, b in zip((g for g, need in zip(found, needed) if need), results):
            assert torch.equal(a, b) and b.is_contiguous()
        torch.library.opcheck(backward, (grads, needed, *kept, *plain), test_utils=("test_schema", "test_faketensor"))
    half = cast((grads, [True] * len(given), *kept, *plain), torch.bfloat16)
    torch.library.opcheck(backward, half, test_utils=("test_faketensor",))


def test_appending_has_no_gradient():
    qkv, k, v = normal(1, 3, 24), torch.zeros(1, 6, 2, 4), torch.zeros(1, 6, 2, 4)
    call = (qkv, torch.ones(8), torch.ones(8), ids([0]), ids([1]), k, v)
    with pytest.raises(ValueError, match="has no gradient; use qk_norm_rope, or torch.no_grad()"):
        hk.qk_norm_rope_append(*call, num_heads=2, grid=(1, 3))
    with torch.no_grad():
        hk.qk_norm_rope_append(*call, num_heads=2, grid=(1, 3))
    assert k[:, :3].abs().max() == 0 and k[:, 3:].abs().max() > 0


# torch.compile

MASK = BlockCausal(2, 2, window_frames=(3, None))
FRAMES = ids([3, 4], [1, 2])
PUBLIC: dict[str, tuple[Callable, list[Tensor]]] = {
    "attention": (lambda q, k, v: hk.attention(q, k, v), [normal(2, 5, 2, 4), normal(2, 7, 2, 4), normal(2, 7, 2, 4)]),
    "attention with counts and logsumexp": (
        lambda q, k, v: hk.attention_with_lse(q, k, v, kv_counts=torch.tensor([[1.0, 2.0, 9.0]])),
        [normal(2, 5, 2, 4), normal(2, 3, 2, 4), normal(2, 3, 2, 4)],
    ),
    "attention over a ring": (
        lambda q, k, v: hk.attention(q, k, v, mask=MASK, q_frames=FRAMES, kv_frames=RING),
        [normal(2, 4, 2, 4), normal(2, 8, 2, 4), normal(2, 8, 2, 4)],
    ),
    "attention beside a context": (
        lambda q, k, v, ck, cv: hk.attention(q, k, v, mask=MASK, context=KVContext(ck, cv, RING)),
        [normal(2, 8, 2, 4, seed=i) for i in range(5)],
    ),
    "merge_attention": (
        lambda a, b, x, y: hk.merge_attention([a, b], [x, y]),
        [normal(2, 5, 2, 4), normal(2, 5, 2, 4, seed=1), normal(2, 2, 5), normal(2, 2, 5, seed=1)],
    ),
    "qk_norm_rope": (
        lambda x, a, b: hk.qk_norm_rope(x, a, b, ids([0, 9]), num_heads=2, grid=(1, 3)),
        [normal(2, 6, 24), normal(8), normal(8)],
    ),
    "ada_layer_norm": (hk.ada_layer_norm, [normal(2, 6, 8), normal(2, 3, 8), normal(1, 3, 8).detach().expand(2, 3, 8)]),
    "layer_norm": (hk.layer_norm, [normal(2, 6, 8), normal(8), normal(8)]),
    "gated_residual": (hk.gated_residual, [normal(2, 6, 8), normal(2, 6, 8, seed=1), normal(1, 2, 8)]),
    "gated_residual_ada_layer_norm": (
        hk.gated_residual_ada_layer_norm,
        [normal(2, 6, 8), normal(2, 6, 8, seed=1), *(normal(1, 2, 8, seed=i) for i in (2, 3, 4))],
    ),
    "gated_residual_ada_layer_norm without a gate": (
        lambda x, y, shift, scale: hk.gated_residual_ada_layer_norm(x, y, None, shift, scale),
        [normal(2, 6, 8), normal(2, 6, 8, seed=1), *(normal(1, 2, 8, seed=i) for i in (3, 4))],
    ),
    "gated_residual_layer_norm": (
        hk.gated_residual_layer_norm,
        [normal(2, 6, 8), normal(2, 6, 8, seed=1), normal(1, 2, 8, seed=2), normal(8, seed=3), normal(8, seed=4)],
    ),
    "rms_norm": (hk.rms_norm, [normal(2, 6, 8), normal(8)]),
    "flow_step": (
        lambda x, v, e: hk.flow_step(x, v, torch.tensor([[0.9]]), torch.tensor([[0.5, 0.0, 0.1]]), e),
        [normal(2, 3, 2, 4, 4, seed=i) for i in range(3)],
    ),
    "rms_silu_pad": (hk.rms_silu_pad, [normal(2, 6, 3, 2, 4), normal(6), normal(2, 6, 2, 2, 4, seed=1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_compile_without_breaks(name):
    """One graph forward, one backward; frame ids are looked at on the host by no one."""
    function, tensors = PUBLIC[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        outs = f(*leaves)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        sum((out * (1 + i)).square().sum() for i, out in enumerate(outs)).backward()
        results.append(([out.detach() for out in outs], [leaf.grad for leaf in leaves]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_compiled_attention_runs_what_was_chosen(impl, lse):
    """The very bits of the eager call, by the implementation that it takes."""
    function = hk.attention_with_lse if lse else hk.attention
    q, k = normal(2, 4, 2, 4, grad=False), normal(2, 8, 2, 4, seed=1, grad=False)
    options = {"mask": MASK, "q_frames": FRAMES, "kv_frames": RING, "impl": impl}
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        with hk.taken() as calls:
            results.append((call(q, k, k, **options), calls))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    assert results[1][1] == results[0][1]


def test_compiled_attention_refuses_as_eager_does():
    q = normal(1, 4, 1, 4)
    compiled = torch.compile(lambda function, **options: function(q, q, q, **options), backend="eager", fullgraph=True)
    for function, options, said in (
        (hk.attention, {"impl": "cudnn"}, "impl='cudnn' cannot run: it needs a CUDA device, got cpu"),
        (hk.attention, {"impl": "fast"}, "knows no impl 'fast'; legal: auto, reference, sdpa"),
        (hk.attention, {"impl": "gluon"}, "impl='gluon' is not for torch.compile; use 'auto' or 'triton'"),
        (hk.attention, {"impl": "triton"}, "impl='triton' needs a CUDA tensor"),
        (hk.attention_with_lse, {"impl": "sdpa"}, "has no gradient with a logsumexp; use 'triton' or 'reference'"),
    ):
        with pytest.raises(Exception, match=re.escape(said)):
            compiled(function, **options)


class Dispatched(TorchDispatchMode):
    """Names of the ops of attention that are called, with what follows the scale in their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hiar":
            self.calls.append((func._opname, *args[12:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize(
    "impl, lse, op",
    [
        ("auto", False, None),
        ("auto", True, None),
        ("triton", False, ("attention",)),
        ("cudnn", False, ("attention_eager", "cudnn", 2, False)),
        ("sdpa", False, ("attention_eager", "sdpa", 2, False)),
        ("reference", True, ("attention_eager", "reference", 2, True)),
    ],
)
def test_compiled_attention_on_cuda(impl, lse, op, triton, monkeypatch):
    """Never the reference unless it was asked for: Triton's kernels are loaded, or an op carries the choice."""
    loaded = []
    monkeypatch.setattr(triton_loader, "load", lambda op, tensor: loaded.append((op, tensor.device.type)))
    monkeypatch.setattr(pointwise, "TRITON_INSTALLED", triton)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    function = hk.attention_with_lse if lse else hk.attention
    with FakeTensorMode(), Dispatched() as dispatched:
        q, k = (torch.empty(1, n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 8))
        function(q, k, k, mask=BlockCausal(2, 2), impl=impl, num_splits=2)
    op = op or (("attention",) if triton else ("attention_eager", "auto", 2, lse))
    assert dispatched.calls == [op]
    assert loaded == ([("attention", "cuda")] if op == ("attention",) else [])


def test_the_op_of_triton_has_no_eager_fallback_on_cuda(monkeypatch):
    """Called by itself, as an exported graph does, it loads its kernels, or the refusal to do so is the error."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    q = normal(1, 4, 1, 16, grad=False)
    with pytest.raises(ValueError, match="attention: impl='triton' needs a CUDA tensor .*, got one on cpu"):
        torch.ops.hiar.attention(*AttentionInputs(q, q, q).as_schema())


def test_compile_appending():
    def append(qkv, frames, slots, k, v):
        return hk.qk_norm_rope_append(qkv, torch.ones(8), torch.ones(8), frames, slots, k, v, num_heads=2, grid=(1, 3))

    compiled = torch.compile(append, fullgraph=True, backend="aot_eager")
    results = []
    for f in (append, compiled):
        k, v = torch.full((2, 2, 12, 2, 4), torch.nan)
        q = [f(normal(2, 6, 24, seed=s, grad=False), ids([s, s + 1]), ids([2, s], [1, 3]), k, v) for s in (0, 1)]
        results.append((q, k, v))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert results[0][1].isnan().any()
