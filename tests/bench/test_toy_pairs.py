"""bench/studies/toy_pairs.py: full marks for a teacher that shows its world, none for one that does not."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from toy_codec import codec_once  # noqa: F401 (fixture)

from bench.studies.toy_pairs import BEGINNINGS, CONTINUING, main, read_toy_pairs
from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.prompt import PROMPT_TOKENS, SLOT_OFFSETS, split_prompts, token_table
from hiar_model.toy.text import ToyTextEncoder
from hiar_model.toy.world import WORLDS, ToyWorld
from hiar_model.train.data.datasets import ToyData
from hiar_model.train.data.trajectories import generate_trajectories

pytestmark = pytest.mark.cpu

FRAMES = 6
WHITE = SLOT_OFFSETS[1] + 7
POOL = token_table([prompt for prompt in split_prompts()[0] if prompt.colour != "white"])


def store(folder, world="plain", **more):
    """Of a teacher that shows beginnings as they are, and white where a clip is a continuing one."""
    codec, shown = ToyCodec.fit(), ToyWorld(WORLDS[world])
    data = ToyData(shown, codec, ToyTextEncoder(32, shown.config.free_speed), POOL, FRAMES, mark_continuing=True)

    def teacher(latents: Tensor, timesteps: Tensor, text: Tensor, attention: str) -> Tensor:
        tokens = text[:, :PROMPT_TOKENS].argmax(-1)
        tokens[:, 4] = SLOT_OFFSETS[4] + 1
        tokens[text[:, PROMPT_TOKENS].any(1), 1] = WHITE
        starts = torch.full((len(tokens), 2), 16.0, dtype=torch.float64)
        return latents - codec.encode(shown.render_batch(tokens, starts, FRAMES))

    options = {"count": 12, "steps": 1, "points": (0, -1), "guidance": 1.0, "teacher_sha256": "none", **more}
    generate_trajectories(teacher, data, folder, **options)
    return folder


def test_each_kind_of_clip_is_read_by_itself(tmp_path):
    readings = read_toy_pairs(store(tmp_path, "free_speed"), "free_speed")
    (n, good), (m, bad) = readings[BEGINNINGS], readings[CONTINUING]
    assert n + m == 12 and min(n, m) > 2
    assert good.colour == good.shape == good.direction == 1 and good.valid > 0.95
    assert good.speed_ratio == pytest.approx(1.1 / (3.5 / 3), abs=0.03)  # its one speed over the world's mean
    assert bad.colour == bad.valid == 0 and bad.shape == 1


def test_the_script(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy_pairs", str(store(tmp_path / "pairs")), "--world", "plain"])
    main()
    beginnings, continuing = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:])
    assert [beginnings[0], beginnings[2]] == ["| beginnings", "100.0"]
    assert [continuing[0], continuing[2]] == ["| continuing clips", "0.0"]


def test_what_is_not_of_the_toy_is_refused(tmp_path):
    class Others:
        latent_shape, fingerprint = (FRAMES, 16, 8, 8), "others"

        def prompts(self, seed, stage, update, samples):
            return torch.rand(len(samples), 5, 32)

        def unconditional(self, batch=1):
            return torch.zeros(batch, 5, 32)

    options = {"count": 1, "steps": 1, "points": (0, -1), "guidance": 1.0, "teacher_sha256": "none"}
    generate_trajectories(lambda x, *_, **__: x, Others(), tmp_path / "text", **options)
    with pytest.raises(ValueError, match="world must be one of plain, varied, .*, scenes_64, got 'flat'"):
        read_toy_pairs(tmp_path / "text", "flat")
    with pytest.raises(ValueError, match="its text is not word vectors of the toy"):
        read_toy_pairs(tmp_path / "text", "plain")
    Others.latent_shape = (FRAMES, 16, 4, 4)
    generate_trajectories(lambda x, *_, **__: x, Others(), tmp_path / "size", **options)
    with pytest.raises(ValueError, match=r"its latents are \[6, 16, 4, 4\], those of the toy end in \[16, 8, 8\]"):
        read_toy_pairs(tmp_path / "size", "plain")
