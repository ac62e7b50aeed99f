"""Choice of the implementation, shared by every op."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

KNOWN_IMPLS = (
    "auto", "reference", "sdpa", "cudnn", "flash", "flash-attn-2", "flash-attn-3", "flash-attn-4", "triton", "gluon",
    "cuda",
)  # fmt: skip


def check_floats(op: str, **tensors: object) -> None:
    """Raise ValueError unless all are tensors of a dtype that the ops compute in, on one device."""
    first, device = "", None
    for name, x in tensors.items():
        check_tensor(op, name, x)
        assert isinstance(x, Tensor)
        if x.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
        if device is None:
            first, device = name, x.device
        elif x.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like {first}, got {x.device}")


def check_tensor(op: str, name: str, x: object) -> None:
    """Raise ValueError unless it is a dense tensor: numpy's arrays, lists, None, sparse and nested tensors are not."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_integers(op: str, name: str, x: object) -> None:
    """Raise ValueError unless it is a tensor of whole numbers; bools are none."""
    check_tensor(op, name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in INTEGERS:
        raise ValueError(f"{op}: {name} must be integers, got {x.dtype}")


def is_number(value: object) -> bool:
    """Whether it is a real number, of Python, of numpy or in a tensor; bools are none."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) or hasattr(value, "__float__")  # dynamo knows the symbols by their types only


def is_whole(value: object) -> bool:
    """Whether it is a whole number, of Python, of numpy or in a tensor; bools are none."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    return hasattr(value, "__index__") and not (isinstance(value, Tensor) and value.is_floating_point())


def check_eps(op: str, eps: float | None) -> None:
    """Raise ValueError unless it is a finite number of at least 0."""
    if eps is None or not is_number(eps) or not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be a finite number of at least 0, got {eps!r}")


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def differentiated(*tensors: Tensor | None) -> bool:
    """Does torch follow the gradient of one of them, backward or in forward mode?"""
    present = [x for x in tensors if x is not None]
    return (torch.is_grad_enabled() and any(x.requires_grad for x in present)) or _in_forward_mode(present)


def require_no_gradient(op: str, reason: str, *tensors: Tensor | None) -> None:
    """Raise ValueError where an op without a gradient would lose that of a tensor without a word."""
    if differentiated(*tensors):
        raise ValueError(f"{op}: {reason}")


def require_autograd(op: str, impl: str, *tensors: Tensor | None) -> None:
    """Raise ValueError if torch.func or forward mode differentiates one of them: kernels have backward formulas for
    torch.autograd alone, and torch drops the tangents of an op without a word.
    """
    present = [x for x in tensors if x is not None]
    if _in_forward_mode(present) or _in_func_grad(present):
        reason = "is differentiated by torch.autograd's backward alone, not by torch.func or in forward mode"
        raise ValueError(f"{op}: impl={impl!r} {reason}; use impl='reference' there")


def _in_forward_mode(tensors: list[Tensor]) -> bool:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _in_func_grad(tensors: list[Tensor]) -> bool:
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    for x in tensors:
        while functorch.is_functorch_wrapped_tensor(x):
            if functorch.is_gradtrackingtensor(x):
                return True
            x = functorch.get_unwrapped(x)
    return False


_preferred: str | None = None
_taken: list[tuple[str, str]] | None = None


@contextmanager
def prefer(impl: str) -> Iterator[None]:
    """Within this block ``impl="auto"`` means ``impl`` in every op that has it, to test or compare a whole model.

    Like an explicit ``impl`` it never falls back: an op that has it but does not support its arguments raises.
    """
    global _preferred
    if impl not in KNOWN_IMPLS:
        raise ValueError(f"prefer: unknown impl {impl!r}; known: {', '.join(KNOWN_IMPLS)}")
    before, _preferred = _preferred, None if impl == "auto" else impl
    try:
        yield
    finally:
        _preferred = before


@contextmanager
def taken() -> Iterator[list[tuple[str, str]]]:
    """Record (op, implementation) of every op that runs within this block."""
    global _taken
    before, _taken = _taken, []
    try:
        yield _taken
    finally:
        _taken = before


def resolve(op: str, impl: str, available: tuple[str, ...], auto: str) -> str:
    """The implementation that ``impl`` stands for: "auto" is resolved, anything else must exist."""
    if impl == "auto":
        return auto if _preferred is None or _preferred not in available else _preferred
    if impl not in available:
        kind = "has no implementation" if impl in KNOWN_IMPLS else "knows no impl"
        raise ValueError(f"{op}: {kind} {impl!r}; legal: auto, {', '.join(available)}")
    return impl


def choose(op: str, impl: str, available: tuple[str, ...], auto: str) -> str:
    """:func:`resolve` for a call that is about to run, which :func:`taken` lists."""
    impl = resolve(op, impl, available, auto)
    if _taken is not None:
        _taken.append((op, impl))
    return impl
