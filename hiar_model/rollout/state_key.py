"""Keys of rollouts' states compared: what two of them do not share."""

from __future__ import annotations

import re


def key_difference(saved: str, now: str) -> str:
    """What two keys of rollouts (:meth:`Rollout.state_dict`) do not share, in words.

    >>> key_difference("Plan(steps=4, order='stream'), 5 blocks", "Plan(steps=4, order='stream'), 6 blocks")
    'it has 5 blocks, this one 6 blocks'
    """
    one, other = _facts(saved), _facts(now)
    had, has = (", ".join(x for x in a if x not in b) for a, b in ((one, other), (other, one)))
    if had and has:
        return f"it has {had}, this one {has}"
    return f"it has {had}, this one has not" if had else f"this one has {has}, it has not"


def _facts(key: str) -> list[str]:
    """The parts of a key: between commas that are not inside brackets nor between the numbers of a list."""
    plain = re.sub(r"^Plan\((.*?)\)(?=, \w+ blocks)", r"\1", key)
    parts = re.split(r", (?![^(\[]*[)\]])(?![\d.]+(?:,|$))", plain)
    names = {"caches": "kv_dtype", "products of attention": "attention_dtype", "linear layers": "linear_dtype"}
    for words, name in names.items():
        parts = [part.replace(f"{words} of ", f"{name}=") for part in parts]
    return ["no last block (num_latent_frames=None, open_end=True)" if x == "None blocks" else x for x in parts]
