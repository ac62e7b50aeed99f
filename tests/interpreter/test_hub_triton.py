"""Triton kernels of a copy under another name, as a kernel of the Hugging Face hub is loaded; beside those of the
package.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import hiar_kernels

pytestmark = pytest.mark.interpreter
ROOT = Path(__file__).resolve().parents[2]


def load(name: str, file: Path, monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_triton_runs_under_another_name(device, tmp_path, monkeypatch):
    build, _ = load("make_hub", ROOT / "hub/make.py", monkeypatch).write(tmp_path / "hub")
    name = json.loads((build / "metadata.json").read_text())["id"]
    hub = load(name, build / "__init__.py", monkeypatch)
    x, weight = torch.randn(1, 7, 24, device=device, requires_grad=True), torch.randn(24, device=device)
    results = []
    for package in (hub, hiar_kernels, hub):
        with package.taken() as choices:
            out = package.rms_norm(x, weight, impl="triton")
        assert choices == [("rms_norm", "triton")]
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
