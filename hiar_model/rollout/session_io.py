"""Sessions: an unfinished video in one safetensors file, to resume or to fork with another prompt.

The file holds the state of the rollout (:meth:`Rollout.state_dict`) and of the decoder, if it has one, as a causal VAE
does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.files import SESSION, check_output, in_folder
from . import Rollout, state_io

FORMAT, VERSION = "hiar-session", 1
FILE = SESSION
PICTURES = "given_sha256"
"""The fact that is a hash of the pictures or the clip that a video starts from."""


@dataclass(frozen=True)
class Session:
    """A loaded session.

    path        of its file
    blocks      finished blocks, prefix included: the number of the next block
    fork_block  the first block that had not started: a different prompt takes effect there
    about       the facts stored by its writer
    """

    path: Path
    blocks: int
    fork_block: int
    about: dict[str, Any]


def save_session(
    path: str | os.PathLike[str], rollout: Rollout, decoder: object = None, about: Mapping[str, Any] | None = None
) -> Path:
    """Save a session. Call it between two blocks, when the decoder has decoded the last one.

    Args:
        path: the file, or a folder for ``session.safetensors``. An old file is replaced atomically.
        decoder: of the video; its ``state_dict()`` is stored, if it has one.
        about: JSON facts that :func:`load_session` compares, such as a hash of the weights.

    Returns:
        Path of the file.

    Raises:
        ValueError: a pipeline of several processes, or a file that cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from hiar_model import HiARTransformer, Rollout, RolloutConfig, WanConfig, load_session, save_session
        >>> model = HiARTransformer(WanConfig(16, 32, 2, 2, text_dim=6, text_len=5, in_channels=4, out_channels=4))
        >>> def video():
        ...     config = RolloutConfig(order="stream")
        ...     return Rollout(model, torch.ones(1, 5, 6), config, num_latent_frames=6, latent_size=(4, 8))
        >>> first, second = video(), video()
        >>> block = next(iter(first))
        >>> load_session(save_session(tempfile.mkdtemp(), first), second).blocks
        1
    """
    target = check_output(_file(path))
    tensors, metadata = session_tensors(rollout, decoder, about)
    try:
        state_io.write(target, tensors, metadata)
    except OSError as error:
        raise ValueError(str(error)) from error
    return target


def session_tensors(
    rollout: Rollout, decoder: object = None, about: Mapping[str, Any] | None = None, device: torch.device | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`save_session` writes: (tensors, metadata) for :func:`.state_io.write`.

    Args:
        device: where to copy all tensors, so that another thread may write them while the rollout goes on; None: they
            stay on their own, and the decoder's are no copies.

    Raises:
        ValueError: a pipeline of several processes.
    """
    if rollout.pipeline is not None and rollout.pipeline.group is not None:
        raise ValueError("a session is one file of one process, this rollout is a pipeline of several: use RunFolder")
    tensors, metadata = state_io.pack(rollout.state_dict(device))
    decoder_tensors, others = _decoder_state(decoder)
    tensors |= {f"decoder.{name}": x for name, x in decoder_tensors.items()}
    metadata |= {
        "format": FORMAT,
        "version": str(VERSION),
        "blocks": json.dumps(rollout.blocks_done),
        "decoder": json.dumps(others),
        "about": json.dumps(dict(about or {})),
    }
    if device is not None:
        tensors = {name: x.to(device, copy=name.startswith("decoder.")) for name, x in tensors.items()}
    return tensors, metadata


def require_same_run(path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
    """ValueError of one line unless a file is a session with these facts; reads its header only."""
    source = _file(path)
    _checked_facts(source, state_io.read_metadata(source), about)


def _checked_facts(source: Path, metadata: Mapping[str, str], about: Mapping[str, Any] | None) -> dict[str, Any]:
    """The facts in the metadata of a session; ValueError if it is none, or others than ``about`` has."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{source} is no session: format must be {FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"{source} is a session of version {metadata.get('version')}, this is version {VERSION}")
    try:
        was: dict[str, Any] = state_io.field(metadata, "about", dict)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for name, now in json.loads(json.dumps(dict(about or {}))).items():
        if name in was and was[name] != now:
            difference = f"{name} was {was[name]!r}, now it is {now!r}"
            if name == PICTURES:
                begins = (
                    "no picture" if was[name] is None else "pictures or a clip" if now is None else "other pictures"
                )
                legal = "leave these out" if was[name] is None else "give the same"
                difference = f"it starts from {begins}: {legal}"
            raise ValueError(f"{source} is of another run: {difference}")
    return was


def load_session(
    path: str | os.PathLike[str], rollout: Rollout, decoder: object = None, about: Mapping[str, Any] | None = None
) -> Session:
    """Restore a saved session into a fresh rollout and decoder; iterating continues from there.

    With the same prompt the result is bitwise that of an uninterrupted run. A different prompt makes a fork: blocks
    that had started keep theirs, as in a run whose prompt changes at :attr:`Session.fork_block`.

    Args:
        rollout: of the same model, plan, schedule and size. decoder: a fresh one of the same kind.
        about: facts that must equal those of the file, where both have them.

    Raises:
        ValueError: the file is missing, corrupt, or of another version, plan, decoder or fact: names it. The rollout
            and the decoder are left untouched.
    """
    source = _file(path)
    tensors, metadata = state_io.read(source)
    was = _checked_facts(source, metadata, about)
    try:
        blocks = state_io.field(metadata, "blocks", int)
        others = None if metadata.get("decoder") == "null" else state_io.field(metadata, "decoder", dict)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    decoder_tensors = state_io.under(tensors, "decoder")
    saved, takes = others is not None, hasattr(decoder, "load_state_dict")
    if saved != takes:
        actual, needed = ("a", "none") if saved else ("no", "one")
        raise ValueError(f"{source} holds {actual} decoder state, this decoder takes {needed}")
    before = decoder.state_dict() if saved else None  # type: ignore[attr-defined]
    try:
        if saved:  # first: if it refuses the state, the rollout is untouched
            decoder.load_state_dict({**decoder_tensors, **(others or {})})  # type: ignore[attr-defined]
        rollout.load_state_dict(state_io.unpack(tensors, metadata))
    except ValueError as error:
        if saved:
            decoder.load_state_dict(before)  # type: ignore[attr-defined]
        raise ValueError(f"{source}: {error}") from error
    return Session(source, blocks, rollout.last_started_block + 1, was)


def _file(path: str | os.PathLike[str]) -> Path:
    return in_folder(path, FILE)


def _decoder_state(decoder: object) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of its state, and the rest as JSON; ({}, None) for a decoder without state."""
    if not hasattr(decoder, "state_dict"):
        return {}, None
    state = decoder.state_dict()
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in state.items() if name not in tensors}
