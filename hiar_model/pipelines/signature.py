"""Functions that take the fields of a dataclass as keyword arguments: signature, docstring, and misspelt names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

from ..common.checks import nearest

Function = TypeVar("Function", bound=Callable[..., Any])


def with_options(options: Any, returns: Any, without: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Append the fields of a dataclass, whose first is ``prompt``, to a function's signature and, unless some are left
    out, docstring. Another name is refused by the function's own, with the nearest legal one.
    """

    def decorate(function: Function) -> Function:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        prompt, *others = (
            inspect.Parameter(
                field.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD if field.name == "prompt" else inspect.Parameter.KEYWORD_ONLY,
                default=field.default if field.name != "prompt" else inspect.Parameter.empty,
                annotation=field.type,
            )
            for field in fields(options)
            if field.name not in without
        )
        first = [p for p in own if p.name == "self"]
        following = [p for p in own if p.name not in ("self", "prompt")]
        signature = inspect.Signature([*first, prompt, *following, *others], return_annotation=returns)
        known = [name for name in signature.parameters if name != "self"]
        name = function.__qualname__.removesuffix(".__call__")

        @functools.wraps(function)
        def checked(*arguments: Any, **named: Any) -> Any:
            for wrong in named.keys() - {*known, *without}:
                raise TypeError(f"{name}() takes no argument {wrong!r}{nearest(wrong, known)}")
            return function(*arguments, **named)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        described = inspect.cleandoc(options.__doc__ or "").partition("\n\n")[2]
        checked.__doc__ = inspect.cleandoc(function.__doc__ or "") + ("" if without else f"\n\n{described}")
        return cast(Function, checked)

    return decorate
