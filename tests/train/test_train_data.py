"""Batches as a function of their key: random numbers, toy clips, and folders of tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.prompt import PROMPT_TOKENS, ToyPrompt, token_table
from hiar_model.toy.text import ToyTextEncoder
from hiar_model.toy.world import WORLDS, ToyWorld, WorldConfig
from hiar_model.train.config.reading import load_recipe
from hiar_model.train.data.datasets import LatentData, PromptData, ToyData
from hiar_model.train.stages.sources import Sources

pytestmark = pytest.mark.cpu

CODEC, TEXT = ToyCodec.fit(frames=200), ToyTextEncoder(32)
WHITE, RED = ToyPrompt("white", "square", "right", "large"), ToyPrompt("red", "square", "up", "large")
SHAPE = (3, 2, 2, 4)  # of the clips of a folder


def toy(
    from_start: float = 0.5,
    pool=(WHITE, RED),
    num_frames: int = 3,
    world: WorldConfig | None = None,
    mark_continuing: bool = False,
) -> ToyData:
    return ToyData(ToyWorld(world), CODEC, TEXT, token_table(pool), num_frames, from_start, mark_continuing)


# The toy world.


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_a_clip_is_that_of_its_key_in_any_batch(world):
    data = toy(world=WORLDS[world])
    whole = data.clips(3, "teacher", 8, range(6))
    assert whole.latents.shape == (6, *data.latent_shape) and whole.latents.dtype == torch.float32
    for rows in ([4], [5, 0], [2, 3, 1]):
        part = data.clips(3, "teacher", 8, rows)
        for name, actual, expected in zip(whole._fields, part, whole):
            assert torch.equal(actual, expected[rows]), name
        assert torch.equal(data.prompts(3, "hiar", 8, rows), data.prompts(3, "hiar", 8, range(6))[rows])
    for other in ((4, "teacher", 8), (3, "critic", 8), (3, "teacher", 9)):
        assert not torch.equal(data.clips(*other, [0]).latents, whole.latents[:1])
    assert not torch.equal(whole.latents[0], whole.latents[1])


def test_clips_show_what_their_text_says():
    data = toy()
    batch = data.clips(0, "teacher", 0, range(24))
    blue = CODEC.decode(batch.latents)[:, :, 2].amax((1, 2, 3)) > 0  # of the two shapes only the white one has any
    white = (batch.prompt_embeds == TEXT.encode([WHITE])).all((1, 2))
    assert torch.equal(blue, white) and 4 < int(white.sum()) < 20
    assert bool((white | (batch.prompt_embeds == TEXT.encode([RED])).all((1, 2))).all())


def test_clips_from_the_start_begin_in_the_middle():
    batch = toy(pool=[WHITE], num_frames=1).clips(0, "teacher", 0, range(200))
    assert abs(float(batch.from_start.float().mean()) - 0.5) < 0.12
    light = CODEC.decode(batch.latents)[:, 0].mean(1) > 0
    middle = light[:, 12:20, 12:20].float().mean((1, 2))
    assert float(middle[batch.from_start].min()) == 1
    assert float(middle[~batch.from_start].mean()) < 0.5
    assert bool(toy(1.0).clips(0, "x", 0, range(20)).from_start.all())
    assert not bool(toy(0.0).clips(0, "x", 0, range(20)).from_start.any())


def test_prompts_are_of_the_pool_and_the_empty_one_is_none_of_them():
    data = toy()
    text = data.prompts(0, "hiar", 1, range(40))
    shares = [(text == TEXT.encode([p])).all((1, 2)).float().mean() for p in (WHITE, RED)]
    assert sum(shares) == 1 and min(shares) > 0.2
    assert torch.equal(data.unconditional(2), TEXT.unconditional(2))


def test_texts_can_tell_a_beginning_from_a_middle():
    plain, marked = toy(), toy(mark_continuing=True)
    batch = marked.clips(0, "teacher", 0, range(20))
    expected = plain.clips(0, "teacher", 0, range(20))
    assert torch.equal(batch.latents, expected.latents) and torch.equal(batch.from_start, expected.from_start)
    assert torch.equal(batch.prompt_embeds[:, :-1], expected.prompt_embeds), "the words stay"
    marks = batch.prompt_embeds[:, -1]
    assert bool((marks[batch.from_start] == 0).all()), "padding: a beginning needs no mark"
    assert torch.equal(marks[~batch.from_start], TEXT.unconditional()[:, 0].expand(int((~batch.from_start).sum()), -1))
    text = marked.prompts(0, "hiar", 0, range(300))
    assert torch.equal(text[:, :-1], plain.prompts(0, "hiar", 0, range(300)))
    assert abs(float((text[:, -1] == 0).all(1).float().mean()) - 0.5) < 0.1
    assert torch.equal(marked.unconditional(2)[:, :-1], plain.unconditional(2))
    assert not bool(marked.unconditional()[:, -1].any())


def test_a_fingerprint_tells_data_apart():
    same = toy().fingerprint
    assert toy().fingerprint == same
    world = dataclasses.replace(WorldConfig(), background=(0.5, 0.5, 0.5))
    for other in (toy(pool=[RED, WHITE]), toy(num_frames=4), toy(world=world), toy(mark_continuing=True)):
        assert other.fingerprint != same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": []}, r"pool must be \[at least 1, 5\] token ids, got \[0, 5\]"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"from_start": 1.5}, r"from_start must be in 0\.\.1, got 1\.5"),
    ],
)
def test_bad_toy_data_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        toy(**change)


def test_sampled_prompts_are_as_long_as_those_of_the_data(monkeypatch):
    """With the token that marks clips from the middle: guidance puts them beside the empty prompt."""
    monkeypatch.setattr(ToyCodec, "fit", lambda **_: CODEC)
    sources = Sources(load_recipe("toy/teacher"), torch.device("cpu"))
    prompts, empty = sources.sample_prompts(2), sources.data.unconditional()
    assert prompts.shape == (2, *empty.shape[1:]) and prompts.shape[1] == PROMPT_TOKENS + 1
    assert not prompts[:, -1].any(), "a sample is the beginning of a video"


# Folders.


def tensors(rows: int = 4, first: int = 0, **more) -> dict[str, torch.Tensor]:
    """A shard whose every row holds its own number."""
    number = torch.arange(first, first + rows, dtype=torch.bfloat16).view(-1, 1, 1)
    return {"text": number.expand(-1, 3, 6).contiguous(), **more}


EMPTY = torch.full((1, 3, 6), -1, dtype=torch.bfloat16)


def latents(rows: int = 4, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + rows, dtype=torch.float16).view(-1, 1, 1, 1, 1).expand(-1, *SHAPE).contiguous()


def test_prompts_of_a_folder(tmp_path):
    save_file(tensors(unconditional=EMPTY), tmp_path / "a.safetensors")
    save_file(tensors(2, first=4), tmp_path / "b.safetensors")
    data = PromptData(tmp_path, SHAPE)
    assert len(data) == 6 and data.latent_shape == SHAPE
    text = data.prompts(0, "hiar", 2, range(60))
    assert text.shape == (60, 3, 6) and text.dtype == torch.bfloat16
    assert set(text.flatten().tolist()) == set(range(6)), "every prompt of both files is drawn"
    assert torch.equal(data.prompts(0, "hiar", 2, [9, 3]), text[[9, 3]])
    assert not torch.equal(data.prompts(0, "hiar", 3, range(60)), text)
    assert torch.equal(data.unconditional(2), EMPTY.expand(2, -1, -1))
    before = data.fingerprint
    assert PromptData(tmp_path, SHAPE).fingerprint == before
    for other in (tensors(3, first=4), tensors(2, first=5)):
        save_file(other, tmp_path / "b.safetensors")
        assert PromptData(tmp_path, SHAPE).fingerprint != before
    save_file(tensors(2, first=4), tmp_path / "b.safetensors")
    assert PromptData(tmp_path, SHAPE).fingerprint == before
    save_file(tensors(unconditional=EMPTY - 1), tmp_path / "a.safetensors")
    assert PromptData(tmp_path, SHAPE).fingerprint != before


def test_clips_of_a_folder_belong_to_their_prompts(tmp_path):
    save_file(tensors(unconditional=EMPTY, latents=latents()), tmp_path / "a.safetensors")
    save_file(tensors(2, first=4, latents=latents(2, 4)), tmp_path / "b.safetensors")
    data = LatentData(tmp_path, SHAPE)
    batch = data.clips(0, "teacher", 0, range(30))
    assert batch.latents.shape == (30, *SHAPE) and batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents.flatten(1)[:, 0], batch.prompt_embeds.flatten(1)[:, 0].float())
    assert len(set(batch.prompt_embeds.flatten(1)[:, 0].tolist())) == 6 and bool(batch.from_start.all())
    assert torch.equal(data.clips(0, "teacher", 0, [9, 3]).latents, batch.latents[[9, 3]])
    for seed, stage, update in ((1, "teacher", 0), (0, "teacher_forcing", 0), (0, "teacher", 1)):
        assert not torch.equal(data.clips(seed, stage, update, range(30)).latents, batch.latents)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no data; expected \*\.safetensors"),
        ({"a": b"nonsense"}, r"a\.safetensors: cannot be read"),
        ({"a": {"unconditional": EMPTY}}, r"a\.safetensors: key text is missing; it holds unconditional"),
        (
            {"a": {"text": torch.zeros(4, 3, 6, dtype=torch.int64)}},
            r"a\.safetensors: text is I64, legal: F32, F16, BF16",
        ),
        ({"a": {"text": torch.zeros(4, 6)}}, r"a\.safetensors: text must be \[N, L, text_dim\], got \[4, 6\]"),
        ({"a": tensors(0, unconditional=EMPTY)}, r"text must be \[N, L, text_dim\], got \[0, 3, 6\]"),
        (
            {"a": tensors(unconditional=EMPTY), "b": {"text": torch.zeros(4, 3, 7, dtype=torch.bfloat16)}},
            r"b\.safetensors: text is \[4, 3, 7\] BF16, expected \[N, 3, 6\] BF16 as in a\.safetensors",
        ),
        (
            {"a": tensors(unconditional=EMPTY), "b": {"text": torch.zeros(4, 3, 6)}},
            r"b\.safetensors: text is \[4, 3, 6\] F32, expected \[N, 3, 6\] BF16",
        ),
        ({"a": tensors()}, r"no file holds the key unconditional \[1, L, text_dim\]"),
        (
            {"a": tensors(unconditional=EMPTY[0])},
            r"a\.safetensors: unconditional must be \[1, 3, 6\] BF16, got \[3, 6\] BF16",
        ),
        ({"a": tensors(unconditional=EMPTY.float())}, r"unconditional must be \[1, 3, 6\] BF16, got \[1, 3, 6\] F32"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(tmp_path, files, message):
    for name, content in files.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with refused(message) as error:
        PromptData(tmp_path, SHAPE)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, r"a\.safetensors: key latents is missing; it holds text, unconditional"),
        ({"latents": latents(3)}, r"a\.safetensors: latents must be \[4, 3, 2, 2, 4\], got \[3, 3, 2, 2, 4\]"),
        ({"latents": latents().int()}, r"a\.safetensors: latents is I32, legal: F32, F16, BF16"),
    ],
)
def test_bad_clips_are_refused(tmp_path, more, message):
    save_file(tensors(unconditional=EMPTY, **more), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        LatentData(tmp_path, SHAPE)


def test_a_shape_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"latent_shape must be \(F, C, H, W\), got \[3, 2, 2\]"):
        PromptData(tmp_path, (3, 2, 2))
    with pytest.raises(ValueError, match="no data; expected"):
        PromptData(tmp_path / "nowhere", SHAPE)
