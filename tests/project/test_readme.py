"""What README shows of the kernels runs as it stands there, and does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu

README = Path(__file__).resolve().parents[1].joinpath("README.md").read_text(encoding="utf-8")


def test_the_example_of_attention_runs():
    example = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "BlockCausal(" in code)
    names: dict = {}
    exec(example, names)
    out, q, k, v = (names[name] for name in ("out", "q", "k", "v"))
    kept = torch.cat([torch.arange(10), torch.arange(20, 30)])  # both slots of its own block, and frames 2 and 3
    visible = [x.transpose(1, 2) for x in (q, k[:, kept], v[:, kept])]
    expected = torch.nn.functional.scaled_dot_product_attention(*visible)
    assert out.shape == (1, 10, 2, 16) and torch.allclose(out, expected.transpose(1, 2), atol=1e-6)


def test_how_to_install_is_said():
    for line in ("source .venv/bin/activate", "pip install torch --index-url https://download.pytorch.org/whl/cpu"):
        assert f"\n{line}\n" in README
