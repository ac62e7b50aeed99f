"""Choice of implementation and one-line refusals, shared by every op."""

from __future__ import annotations

KNOWN_IMPLS = ("auto", "reference", "sdpa", "triton", "cuda")


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def choose(op: str, impl: str, available: tuple[str, ...], auto: str) -> str:
    """The implementation to run: "auto" is resolved, anything else must exist: never a silent fallback."""
    if impl == "auto":
        return auto
    if impl in available:
        return impl
    kind = "has no implementation" if impl in KNOWN_IMPLS else "knows no impl"
    raise ValueError(f"{op}: {kind} {impl!r}; legal: auto, {', '.join(available)}")
