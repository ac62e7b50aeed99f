"""The pointwise ops against formulas written down here, in float64 and within the error budget of narrow dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import naive
import pytest
import torch
from budget import assert_within_budget, normal
from torch import Tensor

from hiar_kernels import (
    ada_layer_norm,
    ada_layer_norm_quantized,
    flow_step,
    gated_residual,
    gated_residual_ada_layer_norm,
    gated_residual_layer_norm,
    layer_norm,
    qk_norm_rope,
    qk_norm_rope_append,
    rms_norm,
)

pytestmark = pytest.mark.cpu

NARROW = [torch.float32, torch.bfloat16, torch.float16]
FRAMES = [[3, 4, 1_000_000], [0, 7, 2]]
GRID = (2, 3)
HEADS, WIDTH = 2, 10  # 5 pairs: 3 turn with the frame, 1 with the row, 1 with the column


def ids(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# One line each: the op, its formula, its arguments


def rotated(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
    """qk_norm_rope by the book."""
    c = HEADS * WIDTH
    q, k = naive.rms_norm(qkv[..., :c], q_weight, 1e-6), naive.rms_norm(qkv[..., c : 2 * c], k_weight, 1e-6)
    q, k, v = (x.unflatten(-1, (HEADS, WIDTH)) for x in (q, k, qkv[..., 2 * c :]))
    q, k = (torch.stack([naive.rope(row, f, *GRID) for row, f in zip(x, FRAMES)]) for x in (q, k))
    return q, k, v


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return naive.layer_norm(x, 1e-6) * (1 + naive.per_frame(scale, 4)) + naive.per_frame(shift, 4)


def gated_and_modulated(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    h = x + naive.per_frame(gate, 4) * y
    return h, modulated(h, shift, scale)


def gated_and_normed(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = x + naive.per_frame(gate, 4) * y
    return h, naive.layer_norm(h, 1e-6) * weight + bias


def stepped(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    s, n = (level.to(x.dtype)[..., None, None, None] for level in (sigma, sigma_next))
    x0 = x - s * v
    return x0, x + (n - s) * v if noise is None else (1 - n) * x0 + n * noise


LEVELS = torch.tensor([[0.9375]]), torch.tensor([[0.8333333, 0.5, 0.25], [0.9, 0.2, 0.01]])
OPS: dict[str, tuple[Callable, Callable, list[Tensor]]] = {
    "qk_norm_rope": (
        lambda *a: qk_norm_rope(*a, ids(FRAMES), num_heads=HEADS, grid=GRID),
        rotated,
        [normal(2, 18, 60, seed=1), 1 + 0.1 * normal(20, seed=2), 1 + 0.1 * normal(20, seed=3)],
    ),
    "ada_layer_norm": (
        ada_layer_norm, modulated, [normal(2, 12, 10, seed=1), normal(2, 3, 10, seed=2), normal(2, 3, 10, seed=3)]
    ),
    "ada_layer_norm of one row": (
        ada_layer_norm, modulated, [normal(2, 12, 10, seed=1), normal(1, 3, 10, seed=2), normal(1, 3, 10, seed=3)]
    ),
    "layer_norm": (
        layer_norm,
        lambda x, w, b: naive.layer_norm(x, 1e-6) * w + b,
        [normal(2, 5, 10, seed=1), 1 + 0.1 * normal(10, seed=2), normal(10, seed=3)],
    ),
    "gated_residual": (
        gated_residual,
        lambda x, y, gate: x + naive.per_frame(gate, 4) * y,
        [normal(2, 12, 10, seed=1), normal(2, 12, 10, seed=2), normal(2, 3, 10, seed=3)],
    ),
    "gated_residual_ada_layer_norm": (
        gated_residual_ada_layer_norm,
        gated_and_modulated,
        [normal(2, 12, 10, seed=1), normal(2, 12, 10, seed=2), *(normal(1, 3, 10, seed=i) for i in (3, 4, 5))],
    ),
    "gated_residual_ada_layer_norm without a gate": (
        lambda x, y, shift, scale: gated_residual_ada_layer_norm(x, y, None, shift, scale),
        lambda x, y, shift, scale: (x + y, modulated(x + y, shift, scale)),
        [normal(2, 12, 10, seed=1), normal(2, 12, 10, seed=2), *(normal(1, 3, 10, seed=i) for i in (4, 5))],
    ),
    "gated_residual_layer_norm": (
        gated_residual_layer_norm,
        gated_and_normed,
        [normal(2, 12, 10, seed=1), normal(2, 12, 10, seed=2), normal(1, 3, 10, seed=3), 1 + 0.1 * normal(10, seed=4),
         normal(10, seed=5)],
    ),
    "rms_norm": (
        rms_norm, lambda x, w: naive.rms_norm(x, w, 1e-6), [normal(2, 5, 10, seed=1), 1 + 0.1 * normal(10, seed=2)]
    ),
    "flow_step, sde": (
        lambda x, v, e: flow_step(x, v, *LEVELS, e),
        lambda x, v, e: stepped(x, v, *LEVELS, e),
        [normal(2, 3, 2, 4, 3, seed=i) for i in (1, 2, 3)],
    ),
    "flow_step, ode": (
        lambda x, v: flow_step(x, v, *LEVELS),
        lambda x, v: stepped(x, v, *LEVELS),
        [normal(2, 3, 2, 4, 3, seed=i) for i in (1, 2)],
    ),
}  # fmt: skip


def run(f: Callable, tensors: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the inputs for a fixed weighting of the outputs."""
    leaves = [x.to(dtype).clone().requires_grad_() for x in tensors]
    outs = f(*leaves)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    sum((out * normal(*out.shape, seed=9 + i).to(dtype)).sum() for i, out in enumerate(outs)).backward()
    return [out.detach() for out in outs], [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", OPS)
def test_float64(name):
    op, formula, tensors = OPS[name]
    tolerance = 1e-9 if name == "qk_norm_rope" else 1e-12  # float64 angles at frame 1,000,000 are 1e-10 apart
    for found, wanted in zip(run(op, tensors, torch.float64), run(formula, tensors, torch.float64)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_error_budget(name, dtype):
    op, formula, tensors = OPS[name]
    tensors = [x.to(dtype).double() for x in tensors]
    three = run(op, tensors, dtype), run(formula, tensors, dtype), run(formula, tensors, torch.float64)
    for kind, found, eager, exact in zip(("output", "gradient"), *three):
        for i, (a, b, c) in enumerate(zip(found, eager, exact)):
            assert_within_budget(a, b, c, f"{kind} {i}")


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    op, _, tensors = OPS[name]
    leaves = [x.clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["ada_layer_norm", "gated_residual", "layer_norm", "rms_norm"])
def test_wide_modulation_of_narrow_activations(name):
    """bfloat16 activations with float32 shift, scale and gate: one rounding, at the end."""
    op, formula, (x, *rest) = OPS[name]
    x = x.bfloat16()
    wide = [x.bfloat16() if x.shape[1:] == (12, 10) else x.float() for x in rest]
    out = op(x, *wide)
    assert out.dtype == torch.bfloat16
    exact = formula(x.double(), *(w.double() for w in wide))
    half_ulp = exact.abs() * 2**-8 + 1e-6  # what float32 adds before it
    assert ((out.double() - exact).abs() <= half_ulp).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_weights_are_summed_in_float32(dtype):
    """1,000 rows of bfloat16 with a gradient of 1 each; on a CPU the sums of torch's own layer_norm stop at 256
    (findings/torch-cpu-layer-norm-gradient-stops-at-256.sh).
    """
    x, ones = normal(1, 1000, 8, seed=1).bfloat16(), torch.ones(8, dtype=dtype)
    bias, shift = torch.zeros(8, dtype=dtype, requires_grad=True), torch.zeros(1, 1, 8, dtype=dtype, requires_grad=True)
    outs = layer_norm(x, ones, bias), ada_layer_norm(x, shift, torch.zeros_like(shift))
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    assert bias.grad.tolist() == [1000] * 8
    assert shift.grad.flatten().tolist() == [1000] * 8


@pytest.mark.parametrize("name", [name for name in OPS if name != "qk_norm_rope"])
def test_memory_order_of_the_input_is_free(name):
    op, formula, tensors = OPS[name]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x for x in tensors]
    assert not turned[0].is_contiguous()
    outs, wanted = op(*turned), formula(*tensors)
    for out, want in zip(*([x] if isinstance(x, Tensor) else x for x in (outs, wanted))):
        assert out.is_contiguous()
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


# RoPE


def turn(fraction: Fraction) -> complex:
    """exp(i angle) for an exact angle, by way of its remainder after full turns."""
    tau = Fraction("6.283185307179586476925286766559005768394338798750211641949889")
    rest = float(fraction % tau)
    return complex(math.cos(rest), math.sin(rest))


@pytest.mark.parametrize("frame", [0, 1, 20, 4096, 1_000_000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-7)], ids=str)
def test_rope_is_exact_far_on(frame, dtype, tolerance):
    """The angle of pair i at frame f is f / 10000^(i / n), reduced here in exact fractions: 1e6 turns lose nothing.

    float64 angles of up to 1e6 are 1e-10 apart; in float32 what remains is the rounding of sine and cosine.
    """
    width = 20  # 10 pairs: 4, 3, 3; 10000^(1/4) = 10 exactly
    qkv = torch.zeros(1, 6, 3 * width, dtype=dtype)
    qkv[..., 0 : 2 * width : 2] = 1  # every pair is the number 1, so it becomes its turn
    ones = torch.ones(width, dtype=dtype)
    q, k, _ = qk_norm_rope(qkv, ones, ones, ids([[frame]]), num_heads=1, grid=GRID, eps=1e-30)
    size = math.sqrt(2)  # a root mean square of 1 for numbers of which half are 0
    for token in range(6):
        y, x = divmod(token, 3)
        angles = [Fraction(frame, 10**i) for i in range(4)]
        angles += [Fraction(p / 10000 ** (i / 3)) for p in (y, x) for i in range(3)]
        for pair, angle in enumerate(angles):
            expected = turn(angle)
            for rotated_row in (q, k):
                real, imag = rotated_row[0, token, 0, 2 * pair : 2 * pair + 2].tolist()
                assert abs(complex(real, imag) / size - expected) <= tolerance, (token, pair)


def test_rope_turns_adjacent_pairs_and_keeps_lengths():
    qkv, qw, kw = OPS["qk_norm_rope"][2]
    far, near = (
        qk_norm_rope(qkv, qw, kw, ids(f), num_heads=HEADS, grid=GRID)[0] for f in (FRAMES, [[0, 0, 0], [0, 0, 0]])
    )
    lengths = [x.unflatten(-1, (-1, 2)).norm(dim=-1) for x in (far, near)]
    torch.testing.assert_close(*lengths)
    assert (far - near).abs().max() > 0.1


def test_v_is_a_view():
    qkv, qw, kw = OPS["qk_norm_rope"][2]
    _, _, v = qk_norm_rope(qkv, qw, kw, ids(FRAMES), num_heads=HEADS, grid=GRID)
    assert v.data_ptr() == qkv[..., 40:].data_ptr() and v.shape == (2, 18, HEADS, WIDTH)


# The ring


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
def test_append_changes_only_the_named_slots(dtype, shared, slot_dtype):
    """Slots in any order, in rows that are every other row of a larger, NaN-filled tensor."""
    qkv, qw, kw = (x.to(dtype) for x in OPS["qk_norm_rope"][2])
    frames = FRAMES[:1] if shared else FRAMES
    slots = torch.tensor([[4, 0, 2]] if shared else [[4, 0, 2], [1, 5, 3]], dtype=slot_dtype)
    all_k, all_v = (torch.full((4, 6 * 6, HEADS, WIDTH), torch.nan, dtype=dtype) for _ in range(2))
    q = qk_norm_rope_append(qkv, qw, kw, ids(frames), slots, all_k[1::2], all_v[1::2], num_heads=HEADS, grid=GRID)
    wanted = qk_norm_rope(qkv, qw, kw, ids(frames), num_heads=HEADS, grid=GRID)
    assert torch.equal(q, wanted[0])
    for cache, new in ((all_k, wanted[1]), (all_v, wanted[2])):
        assert cache[::2].isnan().all()  # the rows between
        framed = cache[1::2].unflatten(1, (6, 6))
        for row in range(2):
            named = slots[row % len(slots)].tolist()
            for frame, slot in enumerate(named):
                assert torch.equal(framed[row, slot], new.unflatten(1, (3, 6))[row, frame])
            assert framed[row, [s for s in range(6) if s not in named]].isnan().all()


def test_append_overwrites():
    """A cache visit lands in the slots of its denoise visit."""
    qkv, qw, kw = OPS["qk_norm_rope"][2]
    k, v = torch.zeros(2, 3, 18, HEADS, WIDTH, dtype=torch.float64)[:, :2]
    for x in (qkv, 2 - qkv):
        qk_norm_rope_append(x, qw, kw, ids(FRAMES), ids([[0, 1, 2]]), k, v, num_heads=HEADS, grid=GRID)
    _, wanted_k, wanted_v = qk_norm_rope(2 - qkv, qw, kw, ids(FRAMES), num_heads=HEADS, grid=GRID)
    assert torch.equal(k, wanted_k) and torch.equal(v, wanted_v)


def test_append_into_a_cache_of_another_dtype():
    qkv, qw, kw = (x.float() for x in OPS["qk_norm_rope"][2])
    k, v = torch.zeros(2, 2, 18, HEADS, WIDTH, dtype=torch.bfloat16)
    q = qk_norm_rope_append(qkv, qw, kw, ids(FRAMES), ids([[0, 1, 2]]), k, v, num_heads=HEADS, grid=GRID)
    _, wanted_k, wanted_v = qk_norm_rope(qkv, qw, kw, ids(FRAMES), num_heads=HEADS, grid=GRID)
    assert q.dtype == torch.float32 and torch.equal(k, wanted_k.bfloat16()) and torch.equal(v, wanted_v.bfloat16())


# Some cells of every frame


@pytest.mark.parametrize("cells", [(0, 6), (0, 2), (2, 5), (5, 6)], ids=str)
def test_cells_of_every_frame_are_that_part_of_the_whole(cells):
    """Outputs, appended keys and gradients; to the bit, but for sums over tokens."""
    leaves = [x.clone().requires_grad_() for x in OPS["qk_norm_rope"][2]]
    options = {"num_heads": HEADS, "grid": GRID}

    def part(x: Tensor) -> Tensor:
        return x.unflatten(1, (3, 6))[:, :, slice(*cells)].flatten(1, 2)

    whole = qk_norm_rope(*leaves, ids(FRAMES), **options)
    found = qk_norm_rope(part(leaves[0]), *leaves[1:], ids(FRAMES), cells=cells, **options)
    of_both = []
    for outs in (found, [part(out) for out in whole]):
        of_both.append(torch.autograd.grad(sum(out.sin().sum() for out in outs), leaves))
    for a, b in zip([*found, *of_both[0]], [*map(part, whole), *of_both[1]]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 if a.dim() == 1 else 0)
    size = cells[1] - cells[0]
    slots = torch.tensor([[4, 0, 2], [1, 5, 3]])
    k, v = torch.full((2, 2, 6 * size, HEADS, WIDTH), torch.nan, dtype=torch.float64)
    with torch.no_grad():
        q = qk_norm_rope_append(part(leaves[0]), *leaves[1:], ids(FRAMES), slots, k, v, cells=cells, **options)
    assert torch.equal(q, found[0])
    for ring, new in ((k, found[1]), (v, found[2])):
        taken = ring.unflatten(1, (6, size))[torch.arange(2)[:, None], slots]
        assert torch.equal(taken, new.unflatten(1, (3, size)))


@pytest.mark.parametrize("cells", [(0, 7), (-1, 3), (2, 2), (4, 2)], ids=str)
def test_cells_outside_the_frame_are_refused(cells):
    qkv, qw, kw = OPS["qk_norm_rope"][2]
    with pytest.raises(ValueError, match=r"cells must be \(start, stop\) with 0 <= start < stop <= 6, got \("):
        qk_norm_rope(qkv, qw, kw, ids(FRAMES), num_heads=HEADS, grid=GRID, cells=cells)


def test_tokens_must_be_those_of_the_cells():
    qkv, qw, kw = OPS["qk_norm_rope"][2]
    with pytest.raises(ValueError, match=r"frames must be \[2 or 1, 18 / 4\], got \[2, 3\]"):
        qk_norm_rope(qkv, qw, kw, ids(FRAMES), num_heads=HEADS, grid=GRID, cells=(1, 5))


def test_ids_that_are_written_to_are_read_again():
    """The angles of a forward are kept for its layers; the next one has other ids, in the same memory."""
    frames, other = ids(FRAMES), ids([[8, 9, 10], [1, 2, 3]])
    arguments, options = OPS["qk_norm_rope"][2], {"num_heads": HEADS, "grid": GRID}
    first = qk_norm_rope(*arguments, frames, **options)
    frames.copy_(other)
    for found, wanted in zip(qk_norm_rope(*arguments, frames, **options), qk_norm_rope(*arguments, other, **options)):
        assert torch.equal(found, wanted)
    with torch.inference_mode():
        qk_norm_rope(*arguments, frames, **options, theta=500.0)
    leaf = arguments[0].clone().requires_grad_()
    qk_norm_rope(leaf, *arguments[1:], frames, **options, theta=500.0)[0].sum().backward()  # saves what was kept
    assert not torch.equal(first[0], qk_norm_rope(*arguments, frames, **options)[0])


# The last step


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("noise", ["sde", "ode", "poison"])
def test_the_last_step_gives_x0_itself(dtype, noise):
    """sigma_next 0, for all frames or for some: the output is x0 to the bit, whatever the noise holds."""
    x, v, e = (normal(2, 3, 2, 4, 3, seed=i).to(dtype) for i in (1, 2, 3))
    e = {"sde": e, "ode": None, "poison": e * torch.nan}[noise]
    for sigma_next in (torch.zeros(1, 1), torch.tensor([[0.0, 0.5, 0.0]])):
        x0, following = flow_step(x, v, torch.tensor([[0.625]]), sigma_next, e)
        last = (sigma_next == 0).expand(1, 3)[0]
        assert x0.dtype == following.dtype == dtype
        assert torch.equal(x0[:, last], following[:, last])
        assert last.all() or not torch.equal(x0, following)


def test_a_whole_ode_of_a_straight_path_arrives():
    """v = eps - x0 exactly: any number of steps ends in x0, by either trajectory."""
    x0, eps = normal(1, 3, 2, 4, 3, seed=1), normal(1, 3, 2, 4, 3, seed=2)
    for noise in (None, eps):
        x = eps
        for sigma, following in ((1.0, 0.9), (0.9, 0.4), (0.4, 0.0)):
            levels = torch.tensor([[[sigma]], [[following]]], dtype=torch.float64)
            clean, x = flow_step(x, eps - x0, *levels, noise)
            torch.testing.assert_close(clean, x0)
        torch.testing.assert_close(x, x0)


def test_qkv_may_lie_by_columns():
    """The reference takes every memory order, as the kernels do."""
    qkv, weight = torch.randn(2, 6, 24), torch.ones(8)
    columns = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    options = {"num_heads": 2, "grid": (1, 3)}
    expected = qk_norm_rope(qkv, weight, weight, ids([[0, 1]]), **options)
    torch.testing.assert_close(qk_norm_rope(columns, weight, weight, ids([[0, 1]]), **options), expected)


@pytest.mark.parametrize("op", [ada_layer_norm, ada_layer_norm_quantized])
def test_shifts_of_any_strides(op):
    """As a slice of a table [frames, B, C]: it was refused by torch, in words about views."""
    x, table = torch.randn(2, 6, 8), torch.randn(3, 2, 8)
    expected = op(x, table.transpose(0, 1).contiguous(), table.transpose(0, 1))
    found = op(x, table.transpose(0, 1), table.transpose(0, 1))
    for a, b in zip(
        expected if isinstance(expected, tuple) else [expected], found if isinstance(found, tuple) else [found]
    ):
        assert torch.equal(a, b) and b.is_contiguous()
