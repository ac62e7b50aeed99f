"""hiar bench on a device: memory, driver, graphs, the small decoder beside the network; the same latents every time."""

from __future__ import annotations

import math

import pytest
import torch

from hiar_model.benchmark.run import DECODED_BESIDE, bench
from hiar_model.benchmark.setting import Setting

pytestmark = pytest.mark.gpu


def test_a_measurement():
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, torch finds none", pytrace=False)
    setting = Setting(
        "wan2.1-t2v-1.3b", 128, 128, {"window_frames": 6}, device=torch.device("cuda"), layers=2, blocks=2, repeats=2
    )
    result = bench(setting, parts=True)
    assert result["machine"]["kind"] == "cuda" and result["execution"]["cuda_graph"] is True
    assert result["latents"]["same_in_all_repeats"] is True and math.isfinite(result["plain"]["largest_difference"])
    assert "absent" in result["clocks"] or result["clocks"]["mhz"]["min"] > 0
    speeds = {speed["decoder"]: speed for speed in result["speeds"]}
    for name in ("none", "small"):
        assert speeds[name]["device_peak_bytes"] > 0 and speeds[name]["frames"] == 2 * 2 * 12
    assert speeds["small"]["also_included"] == [DECODED_BESIDE]
    assert result["parts"]["launches"] > 0
