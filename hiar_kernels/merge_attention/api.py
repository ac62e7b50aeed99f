"""Public merge_attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..common import cuda_loader, pointwise, triton_loader
from ..common.dispatch import check_floats, choose, differentiated
from ..common.torch_library import OPS
from . import ops, reference  # noqa: F401  (registers the op)

IMPLS = ("reference", "triton", "cuda")


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries over disjoint sets of keys into the attention over all of them; exact.

    Args:
        outs: partial outputs, each [B, T, H, D]; a tensor [n, B, T, H, D] is n of them. The kernels read them as they
            lie: rows of one launch, and of another, are not copied together.
        lses: their logsumexps, each [B, H, T] (natural logarithm; -inf where no key was visible), or [n, B, H, T].
        impl: "auto" (a kernel for CUDA tensors that need no gradient, else the reference) | "triton" or "cuda" (one
            pass; bfloat16, float16, float32; no gradient) | "reference" (differentiable).

    Returns:
        out [B, T, H, D] in the dtype of the outs, logsumexp [B, H, T] in float32 (float64 for float64).

    Raises:
        ValueError: nothing to merge, results that differ in number, shape or dtype, or what the kernel does not take.

    Example:
        >>> q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 2, 8)
        >>> partial = [attention_with_lse(q, x, x) for x in (k[:, :2], k[:, 2:])]
        >>> out, lse = merge_attention(*zip(*partial))
        >>> torch.allclose(out, attention(q, k, k), atol=1e-5)
        True
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, Tensor | list | tuple):
            raise ValueError(f"merge_attention: {name} must be tensors, got {type(parts).__name__}")
    if not len(outs) == len(lses) > 0:
        raise ValueError(f"merge_attention: got {len(outs)} outs and {len(lses)} lses; expected n and n >= 1")
    for out, lse in zip(outs, lses, strict=True):
        check_floats("merge_attention", **{"every out": out, "every lse": lse})
    if outs[0].dim() != 4:
        raise ValueError(f"merge_attention: every out must be [B, T, H, D], got {list(outs[0].shape)}")
    b, t, h, _ = outs[0].shape
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or out.dtype != outs[0].dtype:
            want = f"{list(outs[0].shape)} {outs[0].dtype}"
            raise ValueError(f"merge_attention: every out must be {want}, got {list(out.shape)} {out.dtype}")
        if tuple(lse.shape) != (b, h, t):
            raise ValueError(f"merge_attention: every lse must be {[b, h, t]}, got {list(lse.shape)}")
    needs_grad = differentiated(*outs, *lses)
    kernel = "reference" if needs_grad else pointwise.automatic(outs[0], cuda=True)
    impl = choose("merge_attention", impl, IMPLS, auto=kernel)
    if impl == "reference":
        return reference.merge_attention(list(outs), list(lses))
    (cuda_loader if impl == "cuda" else triton_loader).load("merge_attention", outs[0])
    if needs_grad:
        raise ValueError(f"merge_attention: impl={impl!r} has no gradient; use impl='reference', or no_grad()")
    for x in (*outs, *lses):
        if x.device != outs[0].device:
            raise ValueError(f"merge_attention: every out and lse must be on {outs[0].device}, got {x.device}")
    op = OPS.merge_attention_cuda if impl == "cuda" else OPS.merge_attention
    merged: tuple[Tensor, Tensor] = op(list(outs), list(lses))
    return merged
