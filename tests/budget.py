"""The error budget of an implementation: what plain arithmetic in the same dtype would lose, twice."""

from __future__ import annotations

from torch import Tensor, finfo


def assert_within_budget(actual: Tensor, eager: Tensor, exact: Tensor, what: str = "output") -> None:
    """max|actual - exact| <= 2 (max|eager - exact| + eps max|exact|), and the same for the mean.

    Args:
        actual: of the implementation under test. eager: plain torch in the same dtype. exact: float64.
        what: named in the failure.
    """
    assert actual.dtype == eager.dtype, f"{what}: {actual.dtype}, but eager is {eager.dtype}"
    assert actual.shape == eager.shape == exact.shape, f"{what}: {actual.shape}, {eager.shape}, {exact.shape}"
    assert bool(actual.isfinite().all()), f"{what}: not finite"
    eps = finfo(actual.dtype).eps
    error, allowed, size = (x.double() - exact for x in (actual, eager, exact * 0))
    for name, of in (("max", Tensor.max), ("mean", Tensor.mean)):
        found = of(error.abs()).item()
        limit = 2 * (of(allowed.abs()).item() + eps * of(size.abs()).item())
        assert found <= limit, f"{what}: {name} error {found:.3g}, allowed {limit:.3g} ({actual.dtype})"
