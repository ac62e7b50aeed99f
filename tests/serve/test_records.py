"""Records of sessions: what the next server has of them, and what it says where it has other means."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hiar_model import ExecutionConfig
from hiar_model.models.lora import AppliedLora
from hiar_model.serve.keeper import DiskKeeper, _difference
from hiar_model.serve.live import LiveVideo
from hiar_model.serve.metrics import Metrics
from hiar_model.serve.protocol import StartMessage
from hiar_model.serve.session import ViewerSession
from hiar_model.serve.store import Store

pytestmark = pytest.mark.cpu

PROMPT, BLUE = "a red circle moving right", "a blue square moving up"
LORA = AppliedLora("style", "/models/style.safetensors", "ab", 1.0)


def made_by(execution=None, **model):
    keeper = object.__new__(DiskKeeper)
    keeper.execution, keeper.model = execution or ExecutionConfig(), SimpleNamespace(**{
        "weights_sha256": "cd", "loras": (LORA,), "dtype": torch.float32, "device": torch.device("cpu"),
        "decoded_by": None, **model,
    })  # fmt: skip
    return keeper.made_by


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weights_sha256": "ef"}, "other weights"),
        ({"loras": ()}, "other LoRA files"),
        ({"loras": (replace(LORA, scale=0.5),)}, "other LoRA files"),
        ({"decoded_by": {"sha256": "ee"}}, "other decoder"),
        ({"dtype": torch.bfloat16}, "dtype torch.bfloat16, here torch.float32"),
        ({"device": torch.device("cuda", 1)}, "device cuda, here cpu"),
        ({"execution": ExecutionConfig(linear_dtype="int8")}, "linear_dtype int8, here None"),
    ],
)
def test_what_is_different_is_named(other, words):
    assert _difference(made_by(**other), made_by()) == f"it was made with {words}"


def test_so_is_another_noise(monkeypatch):
    now = made_by()
    monkeypatch.setattr("hiar_model.serve.keeper.NOISE", "dice")
    assert _difference(made_by(), now) == "it was made with noise dice, here philox-128"


def test_the_name_of_a_lora_and_the_number_of_a_gpu_matter_not():
    moved = replace(LORA, name="other", path="/elsewhere.safetensors")
    assert made_by(loras=(moved,)) == made_by()
    assert made_by(device=torch.device("cuda", 0)) == made_by(device=torch.device("cuda", 1))


def test_the_next_server_has_all_that_was_asked_for(model, tmp_path):
    """Its defaults may be others: order and size are those that the video had."""
    store = Store(tmp_path)
    keeper = DiskKeeper(store, model, ExecutionConfig(), Metrics(), 10**6)
    session = ViewerSession(StartMessage(1, PROMPT, seed=7, format="webp", resume="token", after=3), None, "")
    session.video = LiveVideo(model, ExecutionConfig(), session.start, disk=keeper.states(session))
    session.video.make()
    session.video.change_prompt(BLUE)
    session.jumps, session.acked, session.playing = [(0, 0), (9, 4)], 8, False
    keeper.changed(session)
    session.ready = object()
    keeper.close([session])
    assert [(state.block, state.started) for state in session.video.disk.before(9)] == [(1, 0)]
    (again,) = DiskKeeper(store, model, ExecutionConfig(), Metrics(), 10**6).restore(tmp_path / "sessions")
    assert again.start == StartMessage(
        1, PROMPT, seed=7, order=session.video.run.config.order, height=32, width=32, format="webp"
    )
    assert (again.id, again.token_hash) == (session.id, session.token_hash) and again.token != session.token
    assert (again.jumps, again.acked, again.playing) == (session.jumps, 8, False)
    assert again.stored == [(0, PROMPT), (1, BLUE)]
    store.close()
