"""The pointwise Triton kernels against the float64 reference: error budget, shapes that are not round, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from budget import assert_within_budget, normal
from torch import Tensor

import hiar_kernels as hk
from hiar_kernels.common import triton_loader

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def tokens(batch: int, count: int, channels: int, per_video: bool = True, frames: int = 1) -> dict[str, Tensor]:
    """x, y [B, T, C] and what belongs to frames, [B or 1, F, C]."""
    rows = batch if per_video else 1
    return {
        "x": 1 + 2 * normal(batch, count, channels, seed=1),
        "y": normal(batch, count, channels, seed=2),
        **{name: normal(rows, frames, channels, seed=3 + i) for i, name in enumerate(("shift", "scale", "gate"))},
        "weight": 1 + 0.1 * normal(channels, seed=6),
        "bias": normal(channels, seed=7),
    }


SHAPES = {
    "two videos": tokens(2, 12, 40, frames=3),
    "modulation shared by the videos": tokens(3, 10, 48, False, 2),
    "one token": tokens(1, 1, 16),
    "frames of one token": tokens(2, 3, 20, frames=3),
    "one frame, odd tokens and channels": tokens(1, 37, 33),
    "more tokens than a group": tokens(2, 2 * 131, 24, False, 2),
    "wide rows": tokens(1, 19, 2100),
    "no full vector": tokens(1, 5, 1),
}
OPS: dict[str, tuple[str, ...]] = {
    "ada_layer_norm": ("x", "shift", "scale"),
    "layer_norm": ("x", "weight", "bias"),
    "gated_residual": ("x", "y", "gate"),
    "gated_residual_ada_layer_norm": ("x", "y", "gate", "shift", "scale"),
    "gated_residual_layer_norm": ("x", "y", "gate", "weight", "bias"),
    "rms_norm": ("x", "weight"),
}
LEVELS = {
    "shared": (torch.tensor([[0.9375]]), torch.tensor([[0.8333333]])),
    "per frame": (torch.tensor([[1.0, 0.9, 0.625]]), torch.tensor([[0.8, 0.0, 0.2], [0.0, 0.5, 0.1]])),
    "per video": (torch.tensor([[0.9], [0.3]], dtype=torch.float64), torch.tensor([[0.5, 0.25, 0.0]])),
}


def run(
    op: Callable, arguments: Sequence[Tensor], dtypes: Sequence[torch.dtype] | torch.dtype, device: torch.device,
    turned: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Outputs, then the gradient of every argument for a fixed weighting of the outputs; on the CPU."""
    dtypes = [dtypes] * len(arguments) if isinstance(dtypes, torch.dtype) else dtypes
    leaves = [a.to(device, d) for a, d in zip(arguments, dtypes, strict=True)]
    if turned:  # the same numbers in another order of memory
        leaves = [a.transpose(-1, -2).contiguous().transpose(-1, -2) if a.dim() > 1 else a for a in leaves]
    leaves = [a.clone().requires_grad_() for a in leaves]
    outs = op(*leaves)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    grads = [normal(*out.shape, seed=90 + i).to(device, out.dtype) for i, out in enumerate(outs)]
    found = torch.autograd.grad(outs, leaves, grads)
    assert all(out.is_contiguous() for out in outs)
    assert [g.dtype for g in found] == [a.dtype for a in leaves]
    return [x.detach().cpu() for x in (*outs, *found)]


def compare(
    op: Callable, arguments: Sequence[Tensor], dtypes: Sequence[torch.dtype] | torch.dtype, device: torch.device,
    turned: bool = False,
) -> None:  # fmt: skip
    """impl="triton" within the budget that the reference in the same dtype sets; op takes impl=."""
    seen = [dtypes] * len(arguments) if isinstance(dtypes, torch.dtype) else dtypes
    arguments = [a.to(d).double() for a, d in zip(arguments, seen, strict=True)]
    cpu = torch.device("cpu")
    actual = run(lambda *a: op(*a, impl="triton"), arguments, dtypes, device, turned)
    eager = run(lambda *a: op(*a, impl="reference"), arguments, dtypes, cpu)
    exact = run(lambda *a: op(*a, impl="reference"), arguments, torch.float64, cpu)
    assert len(actual) == len(exact)
    for i, three in enumerate(zip(actual, eager, exact, strict=True)):
        assert_within_budget(*three, f"tensor {i}, outputs first")


def flow(levels: str, device: torch.device) -> Callable:
    return lambda x, *rest, impl: hk.flow_step(
        x, rest[0], *(s.to(x.device) for s in LEVELS[levels]), *rest[1:], impl=impl
    )


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_error_budget(name, shape, dtype, device):
    compare(getattr(hk, name), [SHAPES[shape][a] for a in OPS[name]], dtype, device)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("arguments", [2, 3], ids=["ode", "sde"])
def test_error_budget_of_flow_step(arguments, levels, dtype, device):
    tensors = [normal(2, 3, 4, 17, 19, seed=i) for i in range(arguments)]  # 1292 numbers a frame: one block and a bit
    compare(flow(levels, device), tensors, dtype, device)


@pytest.mark.parametrize("name", [*OPS, "flow_step"])
def test_mixed_dtypes(name, device):
    """Each argument in a dtype of its own; each gradient comes in the dtype of its argument."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    if name == "flow_step":
        compare(flow("per frame", device), [normal(2, 3, 2, 5, 3, seed=i) for i in range(3)], dtypes, device)
    else:
        arguments = [SHAPES["two videos"][a] for a in OPS[name]]
        compare(getattr(hk, name), arguments, (dtypes + dtypes)[: len(arguments)], device)


@pytest.mark.parametrize("name", [*OPS, "flow_step"])
def test_memory_order_of_the_input_is_free(name, device):
    if name == "flow_step":
        tensors = [normal(2, 3, 2, 5, 3, seed=i) for i in range(3)]
        compare(flow("shared", device), tensors, torch.float32, device, turned=True)
    else:
        compare(getattr(hk, name), [SHAPES["two videos"][a] for a in OPS[name]], torch.float32, device, turned=True)


def test_views_are_read_where_they_lie(device):
    """Slices of larger tensors and unbound modulation, as a model has them: no copy, NaN all around is not read."""
    x, y = (torch.full((4, 20, 80), torch.nan, device=device)[1::2, 3:15, 20:60] for _ in range(2))
    six = torch.full((2, 3, 6, 40), torch.nan, device=device)
    latents = torch.full((4, 9, 2, 5, 3), torch.nan, device=device)[1::2, 2:8:2]
    shift, scale = six.unbind(2)[1:3]
    for i, view in enumerate((x, y, shift, scale, latents)):
        view.copy_(normal(*view.shape, seed=i))
    calls: dict[str, tuple[Tensor, ...]] = {
        "ada_layer_norm": (x, shift, scale),
        "gated_residual": (x, y, scale[:1].expand(2, 3, 40)),
        "gated_residual_ada_layer_norm": (x, y, shift, shift, scale),
        "gated_residual_layer_norm": (x, y, shift, shift[0, 0], scale[0, 0]),
        "layer_norm": (x, shift[0, 0], scale[0, 0]),
        "rms_norm": (x, scale[0, 0]),
        "flow_step": (latents, latents, *(torch.full((1, 1), s, device=device) for s in (0.9, 0.5))),
    }
    for name, arguments in calls.items():
        found = getattr(hk, name)(*arguments, impl="triton")
        wanted = getattr(hk, name)(*(a.contiguous() for a in arguments), impl="reference")
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", [*OPS, "flow_step"])
def test_only_what_is_asked_for(name, device):
    """Each choice of gradients stays within the budget, and asked for again it has the same bits.

    Not those of another choice: a kernel that stores fewer gradients may share its rows out to threads in another way,
    which changes the order of its sums, and may contract other products and sums.
    """
    if name == "flow_step":
        tensors, op = [normal(2, 3, 2, 5, 3, seed=i) for i in range(3)], flow("per frame", device)
    else:
        tensors, op = [SHAPES["two videos"][a] for a in OPS[name]], getattr(hk, name)

    def gradients(wanted: list[int], impl: str, dtype: torch.dtype, at: torch.device) -> list[Tensor]:
        leaves = [a.float().to(at, dtype).requires_grad_(i in wanted) for i, a in enumerate(tensors)]
        outs = op(*leaves, impl=impl)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        weighted = [(normal(*out.shape, seed=90 + i).to(at, dtype), out) for i, out in enumerate(outs)]
        loss = sum((weight * out).sum() for weight, out in weighted)
        return [g.cpu() for g in torch.autograd.grad(loss, [leaves[i] for i in wanted])]

    for wanted in (*([i] for i in range(len(tensors))), *([i, len(tensors) - 1] for i in range(len(tensors) - 1))):
        found, again = (gradients(wanted, "triton", torch.float32, device) for _ in range(2))
        eager, exact = (gradients(wanted, "reference", d, torch.device("cpu")) for d in (torch.float32, torch.float64))
        for i, *three in zip(wanted, found, eager, exact, strict=True):
            assert_within_budget(*three, f"gradient {i} of {wanted}")
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("then", ["ada_layer_norm", "layer_norm"])
def test_fused_is_one_after_the_other(then, dtype, device):
    x, y, gate, *rest = (SHAPES["two videos"][a].to(device, dtype) for a in OPS[f"gated_residual_{then}"])
    h, norm = getattr(hk, f"gated_residual_{then}")(x, y, gate, *rest, impl="triton")
    first = hk.gated_residual(x, y, gate, impl="triton")
    assert torch.equal(h, first)
    second = getattr(hk, then)(first, *rest, impl="triton")
    if device.type == "cpu":  # a GPU may fuse multiplications and additions in one and not in the other
        assert torch.equal(norm, second)
    torch.testing.assert_close(norm, second, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def ungated(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return hk.gated_residual_ada_layer_norm(x, y, None, shift, scale, impl=impl)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gate(shape, dtype, device):
    """Within the budget, and the same numbers as with a gate of ones."""
    arguments = [SHAPES[shape][a] for a in ("x", "y", "shift", "scale")]
    compare(ungated, arguments, dtype, device)
    plain = run(lambda *a: ungated(*a, impl="triton"), arguments, dtype, device)

    def ones(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return hk.gated_residual_ada_layer_norm(x, y, torch.ones_like(shift), shift, scale, impl="triton")

    gated = run(ones, arguments, dtype, device)
    assert torch.equal(plain[0], gated[0])
    if device.type == "cpu":  # on a GPU another kernel may sum in another order
        assert all(torch.equal(a, b) for a, b in zip(plain, gated, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_groups_as_in_training(name, device, monkeypatch):
    """Large groups of tokens; the last one of each frame is not full."""
    monkeypatch.setattr("hiar_kernels.norm.tiles.MANY", 200)
    shape = tokens(1, 2 * 131, 24, frames=2)
    compare(getattr(hk, name), [shape[a] for a in OPS[name]], torch.float32, device)


def test_the_same_bits_every_time(device):
    """No order of programs enters the sums over a frame."""

    def op(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        return hk.gated_residual_ada_layer_norm(*arguments, impl="triton")

    arguments = [SHAPES["more tokens than a group"][a] for a in OPS["gated_residual_ada_layer_norm"]]
    first, second = (run(op, arguments, torch.bfloat16, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_rows_far_from_zero(size, device):
    """The variance is taken around the mean: a large common offset costs no more than it costs the reference."""
    x = (100 + normal(1, 6, 64)) * size
    compare(hk.ada_layer_norm, (x, normal(1, 2, 64), normal(1, 2, 64)), torch.float32, device)
    compare(hk.layer_norm, (x, normal(64), normal(64)), torch.float32, device)
    compare(hk.rms_norm, (x, normal(64)), torch.float32, device)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("noise", ["sde", "ode", "poison"])
def test_the_last_step_gives_x0_itself(dtype, noise, device):
    x, v, e = (normal(2, 3, 2, 4, 3, seed=i).to(device, dtype) for i in (1, 2, 3))
    e = {"sde": e, "ode": None, "poison": e * torch.nan}[noise]
    for following in (torch.zeros(1, 1), torch.tensor([[0.0, 0.5, 0.0]])):
        sigma = torch.tensor([[0.625]], device=device)
        x0, out = hk.flow_step(x, v, sigma, following.to(device), e, impl="triton")
        last = (following == 0).expand(1, 3)[0]
        assert torch.equal(x0[:, last], out[:, last]) and bool(x0.isfinite().all())


@pytest.mark.parametrize("name", [*OPS, "flow_step"])
def test_nothing_in_nothing_out(name, device):
    if name == "flow_step":
        outs = hk.flow_step(*[torch.empty(1, 0, 2, 4, 4, device=device)] * 2, *[torch.ones(1, 1, device=device)] * 2,
                            impl="triton")  # fmt: skip
        assert outs[0].shape == outs[1].shape == (1, 0, 2, 4, 4)
        return
    leaves = [a.to(device, torch.float32) for a in (SHAPES["one token"][a] for a in OPS[name])]
    leaves = [a[:, :0] if a.shape == (1, 1, 16) and i < 1 + name.startswith("gated") else a
              for i, a in enumerate(leaves)]  # fmt: skip
    leaves = [a.detach().requires_grad_() for a in leaves]
    out = getattr(hk, name)(*leaves, impl="triton")
    out = out if isinstance(out, Tensor) else sum(out)
    assert out.shape == (1, 0, 16)
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(out.sum(), leaves))


X = torch.zeros(1, 4, 8)
MOD = torch.zeros(1, 2, 8)
REFUSED: dict[str, tuple[Callable[[torch.device], object], str]] = {
    "x in float64": (
        lambda d: hk.ada_layer_norm(X.to(d).double(), MOD.to(d), MOD.to(d), impl="triton"),
        "ada_layer_norm: impl='triton' takes x as bfloat16, float16 or float32, got torch.float64",
    ),
    "integers": (
        lambda d: hk.gated_residual(X.to(d), X.to(d).int(), MOD.to(d), impl="triton"),
        "gated_residual: y must be bfloat16, float16, float32 or float64, got torch.int32",
    ),
    "another device": (
        lambda d: hk.layer_norm(X.to(d), MOD[0, 0].to("meta"), MOD[0, 0].to(d), impl="triton"),
        "layer_norm: weight must be on {device} like x, got meta",
    ),
    "too wide": (
        lambda d: hk.layer_norm(*(torch.zeros(*s, 9000, device=d) for s in ((1, 1), (), ())), impl="triton"),
        "layer_norm: impl='triton' takes at most 8192 channels, got 9000",
    ),
    "frames that do not divide": (
        lambda d: hk.ada_layer_norm(X.to(d), *[torch.zeros(1, 3, 8, device=d)] * 2, impl="triton"),
        "ada_layer_norm: 4 tokens are no multiple of 3 frames",
    ),
    "noise in float64": (
        lambda d: hk.flow_step(*[torch.zeros(1, 1, 1, 2, 2, device=d)] * 2, *[torch.ones(1, 1, device=d)] * 2,
                               torch.zeros(1, 1, 1, 2, 2, device=d).double(), impl="triton"),
        "flow_step: impl='triton' takes noise as bfloat16, float16 or float32, got torch.float64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_in_one_line(what, device):
    call, line = REFUSED[what]
    with pytest.raises(ValueError) as refused:
        call(device)
    at = torch.empty(0, device=device).device
    assert str(refused.value) == line.format(device=at)


@pytest.mark.parametrize("name", [*OPS, "flow_step"])
def test_compile_without_breaks(name, device):
    """The op goes into one graph, forward and backward, whatever implements it."""
    if name == "flow_step":
        tensors, op = [normal(2, 3, 2, 5, 3, seed=i) for i in range(3)], flow("shared", device)
    else:
        tensors, op = [SHAPES["two videos"][a] for a in OPS[name]], getattr(hk, name)

    def call(*arguments: Tensor) -> object:
        return op(*arguments, impl="triton")

    plain = run(call, tensors, torch.float32, device)
    compiled = run(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors, torch.float32, device)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


@pytest.mark.parametrize("name", [*OPS, "flow_step"])
def test_opcheck(name, device):
    """The kernels keep what schema and fake promise: nothing mutated or aliased, shapes, strides, dtypes."""
    if name == "flow_step":
        x, v, e = (normal(2, 3, 2, 5, 3, seed=i).to(device, torch.bfloat16) for i in range(3))
        arguments = (x, v, *(s.to(device).float() for s in LEVELS["per frame"]), e)
        differentiable = (x, v, e)
    else:
        differentiable = tuple(SHAPES["two videos"][a].to(device, torch.bfloat16) for a in OPS[name])
        arguments = differentiable if name == "gated_residual" else (*differentiable, 1e-6)
    triton_loader.load(name, arguments[0])
    for a in differentiable:
        a.requires_grad_()
    forward, backward = (getattr(torch.ops.hiar, f"{name}{end}").default for end in ("", "_backward"))
    torch.library.opcheck(
        forward, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    outs = forward(*plain)
    grads = [torch.ones_like(out) for out in ((outs,) if isinstance(outs, Tensor) else outs)]
    for needed in ([True] * len(differentiable), [i == 1 for i in range(len(differentiable))]):
        torch.library.opcheck(backward, (grads, needed, *plain), test_utils=("test_schema", "test_faketensor"))
