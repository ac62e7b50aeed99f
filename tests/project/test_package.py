"""What the two packages are to those who install them: a version, types, one line for a mistake."""

from __future__ import annotations

import doctest
import re
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch

import hiar_kernels
import hiar_model

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


def test_one_version():
    assert hiar_kernels.__version__ == hiar_model.__version__
    try:
        assert hiar_kernels.__version__ == metadata.version("hiar-kernels")
    except metadata.PackageNotFoundError:
        assert hiar_kernels.__version__ == "unknown"


def test_the_extra_of_wan_brings_what_its_files_need():
    """spiece.model, as published, is read by sentencepiece and protobuf; without ftfy prompts stay uncleaned."""
    extra = re.search(r"^wan = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    needed = {"diffusers", "transformers", "ftfy", "sentencepiece", "protobuf"}
    assert extra and needed <= set(re.findall(r'"([\w-]+)', extra[1]))


WITH_EXAMPLES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted((ROOT / "hiar_model").rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings(module):
    torch.manual_seed(0)
    failed, tried = doctest.testmod(import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(4, 4, dtype=torch.bool), "a tensor [4, 4] of torch.bool"),
        (torch.ones(4, 4).numpy(), "ndarray"),
        ("causal", "'causal'"),
        (True, "True"),
    ],
    ids=["tensor", "array", "name", "flag"],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_mask_of_another_library(mask, found, impl):
    """PyTorch's attention takes a tensor, others a flag: what is expected here is said, not where Python stumbled."""
    q = torch.randn(1, 4, 2, 8)
    legal = "None or BlockCausal(frame_tokens, frames_per_block, ...): who sees whom goes by frame ids"
    with pytest.raises(ValueError, match=re.escape(f"attention: mask must be {legal}; got {found}")):
        hiar_kernels.attention(q, q, q, mask=mask, impl=impl)
