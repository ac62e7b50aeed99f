"""Names of parametrized tests that fit a line."""

from __future__ import annotations

from typing import Any


def brief(value: Any) -> str:
    """``str(value)``, of a collection that of its items; what would print as a page stands by its type."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={brief(item)}" for name, item in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(brief, value))}]"
    text = str(value)
    return text if isinstance(value, str) or (len(text) <= 100 and "\n" not in text) else type(value).__name__
