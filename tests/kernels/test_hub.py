"""The package as a kernel of the Hugging Face hub, loaded by the real `kernels` package beside the installed one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import kernels
import pytest
import torch
from torch import nn

import hiar_kernels
from hub import make

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("hub") / "hub"
    make.write(built)
    return built


@pytest.fixture(scope="module")
def hub(folder):
    return kernels.get_local_kernel(folder, backend="cpu")


def test_it_is_a_copy_of_its_own_with_its_own_ops(hub, folder):
    about = json.loads((folder / "build/torch-cpu/metadata.json").read_text())
    assert hub.__name__ == about["id"] != hiar_kernels.__name__
    assert hub.__all__ == hiar_kernels.__all__ and hub.rms_norm is not hiar_kernels.rms_norm
    assert hasattr(getattr(torch.ops, about["id"]), "rms_norm")
    assert {loaded.metadata.id for loaded in kernels.get_loaded_kernels()} >= {about["id"]}


def test_it_computes_the_same(hub):
    x, weight, frames = torch.randn(1, 6, 8), torch.randn(8), torch.tensor([[0, 1, 2]])
    assert torch.equal(hub.rms_norm(x, weight), hiar_kernels.rms_norm(x, weight))
    q, k, v = torch.randn(3, 1, 6, 2, 16)
    outs = [
        each.attention(q, k, v, mask=each.BlockCausal(2, 1), q_frames=frames, kv_frames=frames)
        for each in (hub, hiar_kernels)
    ]
    assert torch.equal(*outs)


def test_local_kernels_of_the_environment(folder, hub, monkeypatch):
    """As one tries a build of a kernel that a program takes from the hub."""
    monkeypatch.setenv("LOCAL_KERNELS", f"somebody/hiar-kernels={folder}")
    kernels.load._parse_local_kernel_overrides.cache_clear()
    assert kernels.get_kernel("somebody/hiar-kernels", version=1, backend="cpu") is hub
    kernels.load._parse_local_kernel_overrides.cache_clear()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("kind", "name"), [(nn.RMSNorm, "RMSNorm"), (nn.LayerNorm, "LayerNorm")])
def test_kernelize(folder, kind, name, affine, monkeypatch):
    """A model's norms get the forward of ours: the same results and gradients, and its own weights."""
    layer = kernels.use_kernel_forward_from_hub(name)(type(name, (kind,), {}))
    model = nn.Sequential(nn.Linear(8, 8), layer(8, elementwise_affine=affine))
    for p in model.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 3, 5, 8)
    before = model(x)
    expected = torch.autograd.grad(before.square().sum(), list(model.parameters()))
    local = kernels.LocalLayerRepository(folder, layer_name=name)
    with kernels.use_kernel_mapping({name: {"cpu": local}}, inherit_mapping=False):
        model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    loaded = sys.modules[model[1].forward.__func__.__module__]  # of the build for cpu, or where torch has CUDA for that
    assert loaded.__name__.startswith("_hiar_kernels_")
    ran, function = [], {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm"}[name]
    ours = getattr(loaded, function)

    def counted(*args, **options):
        ran.append(function)
        return ours(*args, **options)

    monkeypatch.setattr(loaded, function, counted)
    after = model(x)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(torch.autograd.grad(after.square().sum(), list(model.parameters())), expected)
    assert ran == [function]


def test_every_layer_is_the_function_of_its_name():
    x, y, of_frames = torch.randn(2, 6, 8), torch.randn(2, 6, 8), torch.randn(2, 3, 8)
    ada, gated = hiar_kernels.layers.AdaLayerNorm(), hiar_kernels.layers.GatedResidual()
    ada.eps = 1e-5
    expected = hiar_kernels.ada_layer_norm(x, of_frames, of_frames, eps=1e-5)
    assert torch.equal(ada(x, of_frames, of_frames), expected)
    assert torch.equal(gated(x, y, of_frames), hiar_kernels.gated_residual(x, y, of_frames))
    rms, torchs = hiar_kernels.layers.RMSNorm(), nn.RMSNorm(8, eps=None, elementwise_affine=False)
    rms.weight, rms.eps = None, None
    torch.testing.assert_close(rms(x), torchs(x))


def test_written_again_it_holds_no_old_file_and_no_other_folder_is_touched(folder, tmp_path):
    (folder / "torch-ext/hiar_kernels/old.py").write_text("")
    (folder / "torch-ext/hiar_kernels/old.py").touch()
    make.write(folder)
    assert not (folder / "torch-ext/hiar_kernels/old.py").exists()
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="holds something else: give a new folder"):
        make.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_imports_are_relative_and_of_torch_and_the_standard_library():
    """What kernels of the hub must keep to; numpy is Triton's interpreter's."""
    import ast
    import sys

    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for name, content in make.sources().items():
        for node in ast.walk(ast.parse(content)) if name.endswith(".py") else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            optional = {"numpy"} if name == "common/interpreter.py" else {"nvtx"} if name == "nvtx.py" else set()
            assert {n.partition(".")[0] for n in names} <= allowed | optional, name
