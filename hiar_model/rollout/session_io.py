"""A video in the making on disk: one safetensors file to go on from, or to fork with another prompt.

The file holds the rollout's state (:meth:`Rollout.state_dict`: rings, latents in flight, the texts that blocks in
flight began with) and the decoder's, where it carries something from block to block, as a causal VAE does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..io.files import SESSION, in_folder
from . import Rollout, state_io

FORMAT, VERSION = "hiar-session", 1
FILE = SESSION


@dataclass(frozen=True)
class Session:
    """Where a saved rollout stands.

    path        of its file
    blocks      how many blocks are finished, those of the prefix among them: the next to come has this number
    fork_block  the first block that had not begun: another text shows from there on
    about       what its writer said of it
    """

    path: Path
    blocks: int
    fork_block: int
    about: dict[str, Any]


def save_session(
    path: str | os.PathLike[str], rollout: Rollout, decoder: object = None, about: Mapping[str, Any] | None = None
) -> Path:
    """Write all that is needed to go on; call it between two blocks, when the decoder has decoded the last one.

    Args:
        path: the file, or a folder to put ``session.safetensors`` into. It is replaced when the new one is whole.
        decoder: of the video; what its ``state_dict()`` returns is kept, if it has one.
        about: facts that :func:`load_session` compares, as JSON takes them; such as a hash of the weights.

    Returns:
        Path of the file.

    Raises:
        ValueError: a pipeline of several processes; or a file that cannot be written.
    """
    if rollout.pipeline is not None and rollout.pipeline.group is not None:
        raise ValueError("a session is one file of one process: a pipeline keeps its states in a folder (RunFolder)")
    target = _file(path)
    state = rollout.state_dict()
    tensors, told = state_io.pack(state)
    kept, others = _decoder_state(decoder)
    tensors |= {f"decoder.{name}": x for name, x in kept.items()}
    told |= {
        "format": FORMAT,
        "version": str(VERSION),
        "blocks": json.dumps(rollout.blocks_done),
        "decoder": json.dumps(others),
        "about": json.dumps(dict(about or {})),
    }
    try:
        state_io.write(target, tensors, told)
    except OSError as error:
        raise ValueError(str(error)) from error
    return target


def load_session(
    path: str | os.PathLike[str], rollout: Rollout, decoder: object = None, about: Mapping[str, Any] | None = None
) -> Session:
    """Bring a fresh rollout, and decoder, to where a saved one stood; iterating goes on from there.

    With the same text it goes on as if never interrupted, bit for bit. With another text it is a fork: blocks that had
    begun keep theirs, and all is as in the run whose text changes at :attr:`Session.fork_block`.

    Args:
        rollout: with the same model, plan, schedule and size. decoder: a fresh one of the same kind.
        about: facts that must be those of the file, as far as both have them.

    Raises:
        ValueError: no such file, corrupt, of another version, plan or decoder, or another fact: names it. The rollout
            and the decoder are untouched then.
    """
    source = _file(path)
    tensors, told = state_io.read(source)
    if told.get("format") != FORMAT:
        raise ValueError(f"{source} is no session: format must be {FORMAT!r}, got {told.get('format')!r}")
    if told["version"] != str(VERSION):
        raise ValueError(f"{source} is a session of version {told['version']}, this is version {VERSION}")
    was = json.loads(told["about"])
    for name, now in json.loads(json.dumps(dict(about or {}))).items():
        if name in was and was[name] != now:
            raise ValueError(f"{source} is of another run: {name} was {was[name]!r}, now it is {now!r}")
    kept, others = state_io.under(tensors, "decoder"), json.loads(told["decoder"])
    saved, takes = others is not None, hasattr(decoder, "load_state_dict")
    if saved != takes:
        found, needed = ("a", "none") if saved else ("no", "one")
        raise ValueError(f"{source} holds {found} decoder state, the decoder given takes {needed}")
    before = decoder.state_dict() if saved else None  # type: ignore[attr-defined]
    try:
        if saved:  # first: a state that it refuses leaves the rollout as it was
            decoder.load_state_dict({**kept, **others})  # type: ignore[attr-defined]
        rollout.load_state_dict(state_io.unpack(tensors, told))
    except ValueError as error:
        if saved:
            decoder.load_state_dict(before)  # type: ignore[attr-defined]
        raise ValueError(f"{source}: {error}") from error
    return Session(source, json.loads(told["blocks"]), rollout.begun + 1, was)


def _file(path: str | os.PathLike[str]) -> Path:
    return in_folder(path, FILE)


def _decoder_state(decoder: object) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Its tensors, and what else it keeps, as JSON takes that; (nothing, None) where it keeps no state."""
    if not hasattr(decoder, "state_dict"):
        return {}, None
    state = decoder.state_dict()
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in state.items() if name not in tensors}
