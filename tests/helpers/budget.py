"""The error budget of an implementation, what plain arithmetic in the same dtype would lose, twice; and numbers."""

from __future__ import annotations

import torch
from torch import Tensor, finfo


def normal(*shape: int, seed: int = 0) -> Tensor:
    """The same float64 every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_within_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, what: str = "output", terms: Tensor | None = None
) -> None:
    """max|actual - exact| <= 2 (max|eager - exact| + eps max|exact|), and the same for the mean.

    Args:
        actual: of the implementation under test. eager: plain torch in the same dtype. exact: float64.
        what: named in the failure.
        terms: sizes of the terms that cancel in exact, where they do. Each is rounded to float32 at best, by half a
            unit in the last place, and that does not cancel; eager may be lucky: with a single key its error is 0 where
            torch's fused attention has 3e-7 (AVX2), and 1.5e-7 where the Triton kernel has 3.5e-7 (H200).
    """
    assert actual.dtype == eager.dtype, f"{what}: {actual.dtype}, but eager is {eager.dtype}"
    assert actual.shape == eager.shape == exact.shape, f"{what}: {actual.shape}, {eager.shape}, {exact.shape}"
    assert bool(actual.isfinite().all()), f"{what}: not finite"
    eps = finfo(actual.dtype).eps
    error, allowed, size = (x.double() - exact for x in (actual, eager, exact * 0))
    floor = torch.zeros(1) if terms is None else terms * finfo(torch.float32).eps / 2
    for name, of in (("max", Tensor.max), ("mean", Tensor.mean)):
        found = of(error.abs()).item()
        limit = 2 * (of(allowed.abs()).item() + eps * of(size.abs()).item() + of(floor).item())
        assert found <= limit, f"{what}: {name} error {found:.3g}, allowed {limit:.3g} ({actual.dtype})"
