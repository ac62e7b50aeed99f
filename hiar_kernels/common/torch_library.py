"""torch.library registration of the ops: schema, fake, and a backward that is itself an op.

Every functional op ``hiar::name`` gets a twin ``hiar::name_backward``. Both run their reference wherever no kernel is
registered for the device, so schemas, fakes and gradients are testable on a CPU; a kernel replaces either by
registering itself for its dispatch key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_ROOT = __name__.partition(".")[0]
NAMESPACE = "hiar" if _ROOT == "hiar_kernels" else _ROOT
"""Of the ops. Loaded under another name, as a kernel of the Hugging Face hub is, the package defines other ops, so that
both may be in one process.
"""
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPS: Any = getattr(torch.ops, NAMESPACE)
_Outputs = tuple[Tensor, ...]
_Value = TypeVar("_Value")
_Call = TypeVar("_Call", bound=Callable[..., Any])


_backends: Any = torch.backends  # incomplete stubs
_PRODUCTS = (_backends.mkldnn.matmul, _backends.cuda.matmul)


def own_arithmetic(function: _Call) -> _Call:
    """Run the function without autocast and with float32 products in float32 (not bfloat16 or TF32), whatever the
    caller has set.
    """

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        autocast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        rough = [place for place in _PRODUCTS if place.fp32_precision not in ("none", "ieee")]
        if not autocast and not rough:
            return function(*args, **kwargs)
        with ExitStack() as back:
            for device in autocast:
                back.enter_context(torch.autocast(device, enabled=False))
            for place in rough:
                back.callback(setattr, place, "fp32_precision", place.fp32_precision)
                place.fp32_precision = "ieee"
            return function(*args, **kwargs)

    return plain  # type: ignore[return-value]


@contextmanager
def _autograd() -> Iterator[None]:
    """Enable autograd inside a kernel, even if a dispatch mode (FLOP counter, selective checkpointing) disabled it."""
    off = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        off = off.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off), torch.enable_grad():
        yield


class _OnlyOnce(torch.autograd.Function):
    """Gradients as they are, which refuse to be differentiated: the backward op has no formula of its own, and without
    one torch warns and takes them for constants.
    """

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> _Outputs:
        ctx.name = name
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise ValueError(f"{ctx.name}: kernels have no second gradient; use impl='reference' there")


PACKAGES: dict[str, str] = {}
"""Op -> the package of its folder, in which its kernels stand."""


def define(
    package: str,
    name: str,
    arguments: str,
    outputs: int,
    reference: Callable[..., Tensor | _Outputs | None],
    fake: Callable[..., Tensor | _Outputs | None],
    differentiable: Sequence[int],
    *,
    mutates: bool = False,
    saves_outputs: bool = False,
) -> None:
    """Define ``hiar::name`` with its reference, fake and (if arguments may receive a gradient) its autograd formula.

    The formula is the op ``hiar::name_backward(Tensor[] grads, bool[] needed, [Tensor[] outputs,] arguments)``:
    ``grads`` of the outputs, ``needed`` one flag for each differentiable argument that is given; it returns the
    gradients that are needed, in order.

    Args:
        package: of the op's folder. name: of the op.
        arguments: schema of the arguments, as torch.library writes them.
        outputs: number of output tensors; an op that mutates may have none.
        reference: eager implementation, differentiable by torch; same positional arguments.
        fake: shapes, dtypes and strides of the outputs.
        differentiable: positions of the tensor arguments that may receive a gradient; none: the op has no gradient.
        mutates: the op writes into an argument; it has no gradient then.
        saves_outputs: the backward is handed the outputs too.
    """
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    PACKAGES[name] = package
    LIBRARY.define(f"{name}({arguments}) -> {returns}")
    LIBRARY.impl(name, own_arithmetic(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if mutates or not differentiable:
        return

    def needed_positions(needed: list[bool], args: Sequence[Any]) -> list[int]:
        present = [i for i in differentiable if args[i] is not None]
        return [i for i, need in zip(present, needed, strict=True) if need]

    def backward_reference(grads: list[Tensor], needed: list[bool], *rest: Any) -> list[Tensor]:
        args = list(rest[1:] if saves_outputs else rest)
        with _autograd():
            leaves = []
            for i in needed_positions(needed, args):
                args[i] = args[i].detach().requires_grad_()
                leaves.append(args[i])
            outs = reference(*args)
            outs = (outs,) if isinstance(outs, Tensor) else outs or ()
            differentiable_outs, their_grads = zip(*(pair for pair in zip(outs, grads) if pair[0].requires_grad))
            gradients = torch.autograd.grad(differentiable_outs, leaves, their_grads, allow_unused=True)
        results, taken = [], {g.untyped_storage().data_ptr() for g in grads}
        for g, w in zip(gradients, leaves, strict=True):
            g = (torch.zeros_like(w) if g is None else g).contiguous()
            if g.untyped_storage().data_ptr() in taken:  # as for x + y: an op may not return its arguments
                g = g.clone()
            taken.add(g.untyped_storage().data_ptr())
            results.append(g)
        return results

    def backward_fake(grads: list[Tensor], needed: list[bool], *rest: Any) -> list[Tensor]:
        args = rest[1:] if saves_outputs else rest
        return [
            torch.empty(args[i].shape, dtype=args[i].dtype, device=args[i].device)
            for i in needed_positions(needed, args)
        ]

    outputs_argument = "Tensor[] outputs, " if saves_outputs else ""
    LIBRARY.define(f"{name}_backward(Tensor[] grads, bool[] needed, {outputs_argument}{arguments}) -> Tensor[]")
    LIBRARY.impl(f"{name}_backward", own_arithmetic(backward_reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}_backward", backward_fake, lib=LIBRARY)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        saved_outputs = ((output,) if isinstance(output, Tensor) else output) if saves_outputs else ()
        ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]
        ctx.others = [None if t else a for a, t in zip(inputs, ctx.is_tensor, strict=True)]
        ctx.save_for_backward(*saved_outputs, *[a for a in inputs if isinstance(a, Tensor)])

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        saved_outputs, tensors = (saved[:outputs], iter(saved[outputs:])) if saves_outputs else ([], iter(saved))
        args = [next(tensors) if t else other for t, other in zip(ctx.is_tensor, ctx.others, strict=True)]
        needed = [ctx.needs_input_grad[i] for i in differentiable if args[i] is not None]
        extra = [saved_outputs] if saves_outputs else []
        op = getattr(OPS, f"{name}_backward")
        gradients = op([g.contiguous() for g in grads], needed, *extra, *args)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _OnlyOnce.apply(name, len(gradients), *gradients, *grads, *saved)
        result: list[Tensor | None] = [None] * len(args)
        for i, gradient in zip(needed_positions(needed, args), gradients, strict=True):
            result[i] = gradient
        return tuple(result)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


_remembered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> (key, value)


def remembered(x: Tensor, key: tuple[Any, ...], make: Callable[[], _Value]) -> _Value:
    """Cached ``make()``, which depends on x and the key alone. On a CPU the last value is cached with x until x is
    written to, because all layers of a forward ask for the same one.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu" or x.is_inference():
        return make()
    key = (x._version, *key)
    entry = _remembered.get(x)
    if entry is None or entry[0] != key:
        with torch.inference_mode(False), torch.no_grad():  # autograd may save the value later
            entry = _remembered[x] = (key, make())
    value: _Value = entry[1]
    return value


def frames_of(x: Tensor, frames: int, name: str) -> int:
    """Tokens per frame of x [B, T, C]; ValueError if T is no multiple of the frames."""
    if frames < 1 or x.shape[1] % frames:
        raise ValueError(f"{name}: {x.shape[1]} tokens are no multiple of {frames} frames")
    return x.shape[1] // frames


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that references compute in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
