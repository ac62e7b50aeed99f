"""The fixtures of this folder, and the repairs of the interpreter, do what they promise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hiar_kernels import rms_norm
from hiar_kernels.common.triton_loader import interpreting

pytestmark = pytest.mark.interpreter


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_memory_is_poisoned(device, dtype):
    x = torch.zeros(4, 3, device=device, dtype=dtype)
    fresh = torch.empty(5, device=device, dtype=dtype), torch.empty_like(x), x.new_empty(2, 2), x.new_empty((7,))
    fresh += (torch.empty_strided((2, 3), (3, 1), device=device, dtype=dtype), x.new_empty_strided((2,), (1,)))
    for tensor in fresh:
        assert bool(tensor.isnan().all())
    assert bool((torch.empty(3, device=device, dtype=torch.int32) == torch.iinfo(torch.int32).max).all())


def test_poison_ends_with_its_test():
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_language_is_patched_once_in_a_launch(device, monkeypatch):
    """Not for each device function that the kernel calls, and not for longer than that."""
    import triton.language as tl
    from triton.runtime import interpreter

    x = torch.ones(1, 2, 8, device=device)
    rms_norm(x, x[0, 0], impl="triton")  # loads the kernels, and with them the repairs
    patched, patch = [], interpreter._patch_lang_core
    monkeypatch.setattr(interpreter, "_patch_lang_core", lambda *language: [patched.append(language), patch(*language)])
    rms_norm(x, x[0, 0], impl="triton")
    assert len(patched) == (2 if interpreting() else 0)  # triton.language and its core
    assert tl.core.is_builtin(tl.load)


def test_what_a_launch_imports_is_there_before():
    """Python 3.10 cannot import Gluon where the language is patched: the first launch of a process failed."""
    lines = "from hiar_kernels.common import interpreter", "interpreter.repair()"
    check = "import sys", "sys.modules['triton.experimental.gluon']"
    subprocess.run([sys.executable, "-c", "\n".join([*lines, *check])], check=True)
