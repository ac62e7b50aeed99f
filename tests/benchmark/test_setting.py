"""Settings of hiar bench that nothing can be measured with: refused before a model is made."""

from __future__ import annotations

import pytest

from hiar_model.benchmark import setting
from hiar_model.benchmark.setting import Setting
from hiar_model.cli import main

pytestmark = pytest.mark.cpu


def test_a_size_that_wan_cannot_make(capsys):
    assert main(["bench", "--model", "wan2.1-t2v-1.3b", "--height", "33", "--device", "cpu"]) == 2
    assert "--height" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="height and width must be multiples of 16, got 33x832"):
        setting.load(Setting("wan2.1-t2v-1.3b", height=33, device="cpu"))


def test_a_model_without_room_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("hiar_model.planning.free_memory.free_bytes", lambda device: 10**9)
    with pytest.raises(
        ValueError, match=r"^wan2.1-t2v-1.3b in float32, its weights and one window .* need 1\d\.\d GB, 1"
    ):
        setting.load(Setting("wan2.1-t2v-1.3b", device="cpu"))
    with pytest.raises(ValueError, match="layers must be a whole number from 1 to 6, got 7"):
        setting.load(Setting("toy", layers=7, device="cpu"))


@pytest.mark.parametrize("name", ["blocks", "repeats"])
def test_nothing_to_measure(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        Setting(**{name: 0})
