"""What the two packages are to those who install them: a version, types, one line for a mistake."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from setuptools.config.pyprojecttoml import read_configuration

import hiar_kernels
import hiar_model

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]


def test_one_version():
    assert hiar_kernels.__version__ == hiar_model.__version__
    try:
        assert hiar_kernels.__version__ == metadata.version("hiar-kernels")
    except metadata.PackageNotFoundError:
        assert hiar_kernels.__version__ == "unknown"


def test_types_are_installed():
    """The marker is there, and among what goes into a wheel."""
    data = read_configuration(str(ROOT / "pyproject.toml"), expand=False)["tool"]["setuptools"]["package-data"]
    for package in ("hiar_kernels", "hiar_model"):
        assert (ROOT / package / "py.typed").is_file() and "py.typed" in data[package]


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(4, 4, dtype=torch.bool), "a tensor [4, 4] of torch.bool"),
        ("causal", "'causal'"),
        (True, "True"),
    ],
    ids=["tensor", "name", "flag"],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_mask_of_another_library(mask, found, impl):
    """PyTorch's attention takes a tensor, others a flag: what is expected here is said, not where Python stumbled."""
    q = torch.randn(1, 4, 2, 8)
    legal = "None or BlockCausal(frame_tokens, frames_per_block, ...): who sees whom goes by frame ids"
    with pytest.raises(ValueError, match=re.escape(f"attention: mask must be {legal}; got {found}")):
        hiar_kernels.attention(q, q, q, mask=mask, impl=impl)
