"""The sources of batches: the toy world, or folders of tensors that an encoder wrote.

A sample is a function of (seed, stage, update, sample) alone (:mod:`hiar_model.common.keyed`): how samples are
distributed over ranks and micro-batches changes no bit.
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
"""Legal dtypes of a data folder, by their names in a safetensors header."""


class Batch(NamedTuple):
    """Clips with their prompts."""

    latents: Tensor  # float32 [b, F, C, H, W]
    prompt_embeds: Tensor  # [b, L, text_dim]
    from_start: Tensor  # bool [b]: the clip is the beginning of a video


class Prompts(Protocol):
    """Data of the stages that need no clips: a teacher's trajectories, a distilled student."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a clip."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; the same for the same data."""

    def prompts(self, seed: int, stage: str, update: int, samples: Sequence[int]) -> Tensor:
        """prompt_embeds of some samples, [b, L, text_dim]."""

    def unconditional(self, batch: int = 1) -> Tensor:
        """The empty prompt, [batch, L, text_dim]."""


class Clips(Prompts, Protocol):
    """Data of the stages that train on clips."""

    def clips(self, seed: int, stage: str, update: int, samples: Sequence[int]) -> Batch:
        """Clips of some samples."""


class ToyData:
    """Clips of the toy world, rendered on demand.

    Args:
        world, codec, text_encoder: of the model. pool: token ids [P, PROMPT_TOKENS] of the prompts to draw from.
        num_frames: of a clip; a frame of the toy is a latent frame. from_start: share of clips that begin a video.
        mark_continuing: prompts get one more token: the null word where the clip comes from the middle of a video, so
            that a network can tell them apart, zeros (which count as padding) where it is a beginning.

    Raises:
        ValueError: an argument out of range, with the legal values.
    """

    def __init__(
        self,
        world: ToyWorld,
        codec: ToyCodec,
        text_encoder: ToyTextEncoder,
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
        self.world, self.codec, self.text_encoder, self.pool = world, codec, text_encoder, pool
        self.from_start, self.mark_continuing = from_start, mark_continuing
        self.latent_shape = (num_frames, *codec.latent_shape(world.config.height, world.config.width))

    @property
    def fingerprint(self) -> str:
        """Of the world, the codec, the words and the prompts."""
        world = dataclasses.asdict(self.world.config)
        settings = [world, self.latent_shape, self.text_encoder.text_dim, self.mark_continuing]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for tensor in (self.pool, *self.codec.state_dict().values()):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def clips(self, seed: int, stage: str, update: int, samples: Sequence[int]) -> Batch:
        """Clips of some samples."""
        latents, tokens, from_start = [], [], []
        for sample in samples:
            generator = keyed_generator(seed, stage, update, sample, "clip")
            from_start.append(float(generator.uniform()) < self.from_start)
            start = "center" if from_start[-1] else "anywhere"
            clip = self.world.sample_batch(1, self.latent_shape[0], generator, start, self.pool)  # type: ignore[arg-type]
            latents.append(self.codec.encode(clip.videos))  # one by one: a matmul's bits depend on its batch
            tokens.append(clip.tokens)
        return Batch(torch.cat(latents), self._encode(torch.cat(tokens), from_start), torch.tensor(from_start))

    def prompts(self, seed: int, stage: str, update: int, samples: Sequence[int]) -> Tensor:
        """float32 [b, PROMPT_TOKENS, text_dim], one token more with ``mark_continuing``."""
        generators = [keyed_generator(seed, stage, update, sample, "prompt") for sample in samples]
        tokens = torch.cat([random_tokens(1, g, self.pool) for g in generators])
        return self._encode(tokens, [float(g.uniform()) < self.from_start for g in generators])

    def unconditional(self, batch: int = 1) -> Tensor:
        """The null prompt, float32 [batch, PROMPT_TOKENS, text_dim], one token more with ``mark_continuing``."""
        return F.pad(self.text_encoder.unconditional(batch), (0, 0, 0, int(self.mark_continuing)))

    def _encode(self, tokens: Tensor, from_start: Sequence[bool]) -> Tensor:
        prompt_embeds = self.text_encoder.encode_tokens(tokens)
        if not self.mark_continuing:
            return prompt_embeds
        mark = self.text_encoder.unconditional()[:, :1] * ~torch.tensor(from_start)[:, None, None]
        return torch.cat([prompt_embeds, mark], 1)


class PromptData:
    """Encoded prompts in a folder of safetensors shards (written by the stage "prompts", or by anything else).

    Every ``*.safetensors`` of the folder holds ``text`` [N, L, text_dim], all with the same L and text_dim; one of them
    at least holds ``unconditional`` [1, L, text_dim] too, the empty prompt of classifier-free guidance. float16,
    bfloat16 or float32; only headers are read at first.

    Args:
        folder: of the shards, sorted by name. latent_shape: (F, C, H, W) of the clips that go with them.

    Raises:
        ValueError: one line with the file and the key that is missing, unreadable or of a wrong shape.
    """

    CLIPS: tuple[str, ...] = ()  # further keys of every shard, as long as its text

    def __init__(self, folder: str | Path, latent_shape: tuple[int, int, int, int]) -> None:
        if len(latent_shape) != 4 or min(latent_shape) < 1:
            raise ValueError(f"latent_shape must be (F, C, H, W), got {list(latent_shape)}")
        self.folder = Path(folder)
        self.latent_shape = latent_shape
        self.files = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        if missing := unfinished(self.folder, ".safetensors"):
            raise ValueError(missing)
        if not self.files:
            raise ValueError(f"{self.folder}: no data; expected *.safetensors with text [N, L, text_dim]")
        self.index: list[tuple[int, int]] = []  # (file, row in it) of every prompt
        self._unconditional: Path | None = None
        self._text: tuple[list[int], str] | None = None
        for number, file in enumerate(self.files):
            self.index += [(number, row) for row in range(self._check(file))]
        if self._unconditional is None:
            raise ValueError(f"{self.folder}: no file holds the key unconditional [1, L, text_dim], the empty prompt")

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """Of the names and sizes of the files, the first prompt of each, and the empty prompt."""
        digest = hashlib.sha256(json.dumps([(f.name, f.stat().st_size) for f in self.files]).encode())
        digest.update(json.dumps(self.latent_shape).encode())
        first = [i for i, (_, row) in enumerate(self.index) if row == 0]
        for tensor in (self._read("text", first), self.unconditional()):
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def prompts(self, seed: int, stage: str, update: int, samples: Sequence[int]) -> Tensor:
        """[b, L, text_dim] in the dtype of the files."""
        return self._read("text", self._draw(seed, stage, update, samples, "prompt"))

    def first(self, count: int) -> Tensor:
        """The first prompts, [at most count, L, text_dim] in the dtype of the files."""
        return self._read("text", range(min(count, len(self))))

    def unconditional(self, batch: int = 1) -> Tensor:
        """The empty prompt, [batch, L, text_dim] in the dtype of the files."""
        assert self._unconditional is not None
        with open_tensors(self._unconditional) as opened:
            return opened.get_tensor("unconditional").expand(batch, -1, -1)

    def _draw(self, seed: int, stage: str, update: int, samples: Sequence[int], what: str) -> list[int]:
        generators = (keyed_generator(seed, stage, update, sample, what) for sample in samples)
        return [int(g.whole(len(self))) for g in generators]

    def _read(self, key: str, indices: Sequence[int]) -> Tensor:
        tensors: dict[int, Tensor] = {}
        for number in {self.index[i][0] for i in indices}:
            with open_tensors(self.files[number]) as opened:
                part = opened.get_slice(key)
                for i in indices:
                    if self.index[i][0] == number:
                        row = self.index[i][1]
                        tensors[i] = part[row : row + 1]
        return torch.cat([tensors[i] for i in indices])

    def _check(self, file: Path) -> int:
        """Check a file's header; returns its number of prompts."""
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

    @property
    def fingerprint(self) -> str:
        """That of the prompts, and of the first clip of each file."""
        digest = hashlib.sha256(super().fingerprint.encode())
        first = [i for i, (_, row) in enumerate(self.index) if row == 0]
        for i in first:  # one by one: clips are large
            digest.update(self._read("latents", [i]).contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def clips(self, seed: int, stage: str, update: int, samples: Sequence[int]) -> Batch:
        """Clips of some samples, latents in float32."""
        indices = self._draw(seed, stage, update, samples, "clip")
        from_start = torch.ones(len(indices), dtype=torch.bool)
        return Batch(self._read("latents", indices).float(), self._read("text", indices), from_start)


def open_tensors(file: Path) -> safetensors.safe_open:
    """Open a safetensors file and read its header; ValueError of one line if that fails."""
    refuse_stand_in(file)
    try:
        return safetensors.safe_open(file, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
