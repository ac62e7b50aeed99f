"""The fixtures of this folder do what they promise."""

from __future__ import annotations

import pytest
import torch

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
