"""Where batches come from: the toy world, or folders of tensors that an encoder wrote.

Row ``row`` of update ``update`` of a stage is a function of (seed, stage, update, row) alone
(:mod:`hiar_model.common.keyed`): how rows are dealt out over ranks and micro-batches changes no number, to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.keyed import keyed_generator
from ...io.files import refuse_stand_in
from ...toy.codec import ToyCodec
from ...toy.prompt import PROMPT_TOKENS, random_tokens
from ...toy.text import ToyTextEncoder
from ...toy.world import ToyWorld
from .shards import unfinished

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What tensors of a data folder may be, by their names in a safetensors header."""


class Batch(NamedTuple):
    """Clips with their prompts."""

    latents: Tensor  # float32 [b, F, C, H, W]
    text: Tensor  # [b, L, text_dim]
    from_start: Tensor  # bool [b]: the clip is the beginning of a video


class Prompts(Protocol):
    """What stages that need no clips ask of their data: a distilled student, a teacher's trajectories."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a clip."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; the same for the same data."""

    def prompts(self, seed: int, stage: str, update: int, rows: Sequence[int]) -> Tensor:
        """Text of the given rows, [b, L, text_dim]."""

    def unconditional(self, batch: int = 1) -> Tensor:
        """The empty prompt, [batch, L, text_dim]."""


class Clips(Prompts, Protocol):
    """What a teacher asks of its data."""

    def clips(self, seed: int, stage: str, update: int, rows: Sequence[int]) -> Batch:
        """Clips of the given rows."""


class ToyData:
    """Clips of the toy world, rendered as they are asked for.

    Args:
        world, codec, text: of the model. pool: token ids [P, PROMPT_TOKENS] of the prompts to draw from.
        num_frames: of a clip. from_start: share of clips that are the beginning of a video.
        mark_continuing: texts get one more token: the null word where the clip comes from the middle of a video, so
            that a network can tell them apart, zeros (padding, as if there were none) where it is a beginning.

    Raises:
        ValueError: names what is out of range.
    """

    def __init__(
        self,
        world: ToyWorld,
        codec: ToyCodec,
        text: ToyTextEncoder,
        pool: Tensor,
        num_frames: int,
        from_start: float = 0.5,
        mark_continuing: bool = False,
    ) -> None:
        if pool.dim() != 2 or not len(pool) or pool.shape[1] != PROMPT_TOKENS:
            raise ValueError(f"ToyData: pool must be [at least 1, {PROMPT_TOKENS}] token ids, got {list(pool.shape)}")
        if num_frames < 1:
            raise ValueError(f"ToyData: num_frames must be at least 1, got {num_frames}")
        if not 0 <= from_start <= 1:
            raise ValueError(f"ToyData: from_start must be in 0..1, got {from_start}")
        self.world, self.codec, self.text, self.pool = world, codec, text, pool
        self.from_start, self.mark_continuing = from_start, mark_continuing
        self.latent_shape = (num_frames, *codec.latent_shape(world.config.height, world.config.width))

    @property
    def fingerprint(self) -> str:
        """Of the world, the codec, the words and the prompts."""
        told = json.dumps(
            [dataclasses.asdict(self.world.config), self.latent_shape, self.text.text_dim, self.mark_continuing]
        )
        digest = hashlib.sha256(told.encode())
        for tensor in (self.pool, *self.codec.state_dict().values()):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def clips(self, seed: int, stage: str, update: int, rows: Sequence[int]) -> Batch:
        """Clips of the given rows."""
        latents, tokens, begins = [], [], []
        for row in rows:
            generator = keyed_generator(seed, stage, update, row, "clip")
            begins.append(float(generator.uniform()) < self.from_start)
            start = "center" if begins[-1] else "anywhere"
            sample = self.world.sample_batch(1, self.latent_shape[0], generator, start, self.pool)  # type: ignore[arg-type]
            latents.append(self.codec.encode(sample.videos))  # one by one: a matmul's bits depend on its batch
            tokens.append(sample.tokens)
        return Batch(torch.cat(latents), self._text(torch.cat(tokens), begins), torch.tensor(begins))

    def prompts(self, seed: int, stage: str, update: int, rows: Sequence[int]) -> Tensor:
        """Text of the given rows, float32 [b, PROMPT_TOKENS, text_dim], one token more with ``mark_continuing``."""
        generators = [keyed_generator(seed, stage, update, row, "prompt") for row in rows]
        tokens = torch.cat([random_tokens(1, g, self.pool) for g in generators])
        return self._text(tokens, [float(g.uniform()) < self.from_start for g in generators])

    def unconditional(self, batch: int = 1) -> Tensor:
        """The null prompt, float32 [batch, PROMPT_TOKENS, text_dim], one token more with ``mark_continuing``."""
        return F.pad(self.text.unconditional(batch), (0, 0, 0, int(self.mark_continuing)))

    def _text(self, tokens: Tensor, begins: Sequence[bool]) -> Tensor:
        text = self.text.encode_tokens(tokens)
        if not self.mark_continuing:
            return text
        mark = self.text.unconditional()[:, :1] * ~torch.tensor(begins)[:, None, None]
        return torch.cat([text, mark], 1)


class PromptData:
    """Prompts that a text encoder has left in a folder of safetensors shards (the stage "prompts", or anything else).

    Every ``*.safetensors`` of the folder holds ``text`` [N, L, text_dim], all with the same L and text_dim; one of them
    at least holds ``unconditional`` [1, L, text_dim] too, the empty prompt of classifier-free guidance. float16,
    bfloat16 or float32; nothing is read before it is asked for.

    Args:
        folder: of the shards, taken in the order of their names. latent_shape: (F, C, H, W) of the clips to be made.

    Raises:
        ValueError: one line that names the file and the key that is missing, unreadable or of a wrong shape.
    """

    CLIPS: tuple[str, ...] = ()  # further keys that every shard holds, as long as its text

    def __init__(self, folder: str | Path, latent_shape: tuple[int, int, int, int]) -> None:
        if len(latent_shape) != 4 or min(latent_shape) < 1:
            raise ValueError(f"latent_shape must be (F, C, H, W), got {list(latent_shape)}")
        self.folder = Path(folder)
        self.latent_shape = latent_shape
        self.files = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        if missing := unfinished(self.folder, ".safetensors"):
            raise ValueError(missing)
        if not self.files:
            raise ValueError(f"{self.folder}: no data found; expected *.safetensors with text [N, L, text_dim]")
        self.places: list[tuple[int, int]] = []  # (file, row in it) of every prompt
        self._unconditional: Path | None = None
        self._text: tuple[list[int], str] | None = None
        for number, file in enumerate(self.files):
            rows = self._check(file)
            self.places += [(number, row) for row in range(rows)]
        if self._unconditional is None:
            raise ValueError(f"{self.folder}: no file holds the key unconditional [1, L, text_dim], the empty prompt")

    def __len__(self) -> int:
        return len(self.places)

    @property
    def fingerprint(self) -> str:
        """Of the names and sizes of the files, the first prompt of each, and the empty prompt."""
        digest = hashlib.sha256(json.dumps([(f.name, f.stat().st_size) for f in self.files]).encode())
        digest.update(json.dumps(self.latent_shape).encode())
        begins = [i for i, (_, row) in enumerate(self.places) if row == 0]
        for tensor in (self._read("text", begins), self.unconditional()):
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def prompts(self, seed: int, stage: str, update: int, rows: Sequence[int]) -> Tensor:
        """Text of the given rows, [b, L, text_dim] in the dtype of the files."""
        return self._read("text", self._draw(seed, stage, update, rows, "prompt"))

    def first(self, count: int) -> Tensor:
        """Text of the first prompts, [at most count, L, text_dim] in the dtype of the files."""
        return self._read("text", range(min(count, len(self))))

    def unconditional(self, batch: int = 1) -> Tensor:
        """The empty prompt, [batch, L, text_dim] in the dtype of the files."""
        assert self._unconditional is not None
        with open_tensors(self._unconditional) as opened:
            return opened.get_tensor("unconditional").expand(batch, -1, -1)

    def _draw(self, seed: int, stage: str, update: int, rows: Sequence[int], what: str) -> list[int]:
        generators = (keyed_generator(seed, stage, update, row, what) for row in rows)
        return [int(g.whole(len(self))) for g in generators]

    def _read(self, key: str, indices: Sequence[int]) -> Tensor:
        found: dict[int, Tensor] = {}
        for number in {self.places[i][0] for i in indices}:
            with open_tensors(self.files[number]) as opened:
                part = opened.get_slice(key)
                for i in indices:
                    if self.places[i][0] == number:
                        row = self.places[i][1]
                        found[i] = part[row : row + 1]
        return torch.cat([found[i] for i in indices])

    def _check(self, file: Path) -> int:
        """How many prompts a file holds, from its header."""
        with open_tensors(file) as opened:
            keys = set(opened.keys())
            shapes = {key: list(opened.get_slice(key).get_shape()) for key in keys}
            dtypes = {key: str(opened.get_slice(key).get_dtype()) for key in keys}
        for key in ("text", *self.CLIPS):
            if key not in keys:
                raise ValueError(f"{file}: key {key} is missing; it holds {', '.join(sorted(keys)) or 'nothing'}")
        for key in keys & {"text", "unconditional", *self.CLIPS}:
            if dtypes[key] not in FLOATS:
                raise ValueError(f"{file}: {key} is {dtypes[key]}, legal: {', '.join(FLOATS)}")
        text, dtype = shapes["text"], dtypes["text"]
        if len(text) != 3 or 0 in text:
            raise ValueError(f"{file}: text must be [N, L, text_dim], got {text}")
        if self._text is None:
            self._text = text[1:], dtype
        elif self._text != (text[1:], dtype):
            raise ValueError(
                f"{file}: text is {text} {dtype}, expected [N, {self._text[0][0]}, {self._text[0][1]}] {self._text[1]} "
                f"as in {self.files[0].name}"
            )
        if "unconditional" in keys:
            if shapes["unconditional"] != [1, *text[1:]] or dtypes["unconditional"] != dtype:
                raise ValueError(
                    f"{file}: unconditional must be {[1, *text[1:]]} {dtype}, "
                    f"got {shapes['unconditional']} {dtypes['unconditional']}"
                )
            self._unconditional = self._unconditional or file
        for key in self.CLIPS:
            if shapes[key] != [text[0], *self.latent_shape]:
                raise ValueError(f"{file}: {key} must be {[text[0], *self.latent_shape]}, got {shapes[key]}")
        return text[0]


class LatentData(PromptData):
    """Real clips for a teacher: a :class:`PromptData` whose every shard holds ``latents`` [N, F, C, H, W] too, one clip
    for each prompt, each the beginning of a video."""

    CLIPS = ("latents",)

    def clips(self, seed: int, stage: str, update: int, rows: Sequence[int]) -> Batch:
        """Clips of the given rows, latents in float32."""
        indices = self._draw(seed, stage, update, rows, "clip")
        begins = torch.ones(len(indices), dtype=torch.bool)
        return Batch(self._read("latents", indices).float(), self._read("text", indices), begins)


def open_tensors(file: Path) -> safetensors.safe_open:
    """A safetensors file, its header read; ValueError of one line if it is not there or not readable."""
    refuse_stand_in(file)
    try:
        return safetensors.safe_open(file, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
