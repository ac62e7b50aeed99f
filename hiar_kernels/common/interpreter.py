"""Repairs of Triton's interpreter (3.6 to 3.9), in one place. Nothing here runs on a GPU.

The interpreter keeps bfloat16 as raw 16-bit integers. Upstream multiplies, adds, compares and converts those bits as if
they were numbers, and truncates float32 to bfloat16 instead of rounding to nearest. The repair computes such operations
in float32 and rounds once. Still wrong upstream, so kernels avoid it: tl.sum over bfloat16 (cast first), atomics on it.
A comparison of scalars is a number of their type to it, and as a mask 3.9 refuses that.

It is also made several times faster, with the same results: upstream patches the language anew at every call of a
device function (tl.zeros is one), computes overflow checks of which it then says nothing, and describes the type and
shape of every intermediate result from scratch.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np

_done = False


def widen(bits: Any) -> Any:
    """uint16 bfloat16 bits -> float32 numbers."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: Any) -> Any:
    """float32 numbers -> uint16 bfloat16 bits, to the nearest, ties to even; NaN stays NaN."""
    exact = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = exact.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(exact), np.uint16(0x7FC0), rounded).astype(np.uint16)


def repair() -> None:
    """Patch the interpreter; once in a process, before the first launch."""
    global _done
    if _done:
        return
    _done = True
    import triton.language as tl
    from triton.runtime import interpreter

    importlib.import_module("triton.experimental.gluon")  # Python 3.10 cannot in a launch, when the language is patched
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(x: Any) -> bool:
        return x.dtype.scalar.name == "bf16"

    def up(x: Any) -> Any:
        return handle(widen(x.data), tl.float32) if is_bf16(x) else x

    def down(numbers: Any) -> Any:
        return handle(narrow(numbers), tl.bfloat16)

    original = {
        name: getattr(builder, name)
        for name in ("create_dot", "binary_op", "unary_op", "cast_impl", "create_fp_to_fp", "create_fma")
    }

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        return original["create_dot"](self, up(a), up(b), accumulator, *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (is_bf16(left) and left.data.dtype == np.uint16):
            result = original["binary_op"](self, left, right, op)
            if result.data.dtype == np.bool_:  # of a comparison: else it goes on as the numbers that were compared
                result.dtype = tl.int1
            return result
        out = op(widen(left.data), widen(right.data))
        return handle(out, tl.bfloat16) if out.dtype == np.bool_ else down(out)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return down(op(widen(x.data))) if is_bf16(x) else original["unary_op"](self, x, op)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_bf16(source):
            return source if target.scalar == tl.bfloat16 else original["cast_impl"](self, up(source), target)
        if target.scalar == tl.bfloat16:
            return down(source.data.astype(np.float32))
        return original["cast_impl"](self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        nearest = rounding != interpreter._ir.ROUNDING_MODE.RTZ
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32 and nearest:
            return down(source.data)
        return original["create_fp_to_fp"](self, source, target, rounding)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not is_bf16(z):
            return original["create_fma"](self, x, y, z)
        return down(widen(x.data) * widen(y.data) + widen(z.data))

    def get_bf16(self: Any, value: float) -> Any:
        return down(np.array([value], dtype=np.float32))

    for function in (create_dot, binary_op, unary_op, cast_impl, create_fp_to_fp, create_fma, get_bf16):
        setattr(builder, function.__name__, function)

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        """numpy >= 2.4 refuses int() of a one-element array, which loops bounded by the device need (Triton 3.6)."""
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = patch_lang_tensor
    _quicken()


def _quicken() -> None:
    """Leave out what a launch does again and again for nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    # Its checks end in device_assert, which is silent without options.debug, and that is never set.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)

    patch_lang, patch_attr, builtins = interpreter._patch_lang, interpreter._patch_attr, {}
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_lang_once(function: Any) -> Any:
        """At the launch, for all device functions that the kernel calls."""
        patched = not tl.core.is_builtin(tl.load)
        return interpreter._LangPatchScope() if patched else patch_lang(everything)

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in builtins:
            builtins[package] = [(n, m) for n, m in inspect.getmembers(package) if tl.core.is_builtin(m)]
        for name, member in builtins[package]:
            patch_attr(package, name, member, builder, scope)

    get_np_dtype, dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = get_np_dtype(dtype)
        return dtypes[name]

    block_type, tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
    block_types, tensors = {}, {}

    def block_type_once(self: Any, element: Any, shape: Any) -> None:
        """Types are equal by their names, and never change."""
        key = element.name, *(getattr(size, "value", size) for size in shape)
        if key not in block_types:
            block_type(self, element, shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key])

    def tensor_once(self: Any, handle: Any, type: Any) -> None:
        """All but the numbers follows from the type."""
        if type.name not in tensors:
            tensor(self, None, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle)

    tl.core.block_type.__init__, tl.core.tensor.__init__ = block_type_once, tensor_once
    interpreter._patch_lang = patch_lang_once
    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = get_np_dtype_once
