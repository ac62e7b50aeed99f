"""How many operations a task launches on a CUDA device: at most 15 a layer, with kernels fused and nothing copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from device_operations import LAYERS, REQUEST, launches, on_cuda, operations
from made_runs import changed

from hiar_model.models import transformer
from hiar_model.planning.memory import Request

pytestmark = pytest.mark.cpu

MOST_A_LAYER = 15
MOST_BESIDE = 12  # patches, modulation, the head, the step of the schedule, whether it is finite
# In the last layer of a batch of which some rows end there and the others are no neighbours: x and modulation are
# picked out, attention runs once for each run of rows, and its outputs are joined.
MOST_OF_PICKING = 5


def too_many(request: Request, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, int]]:
    """One line for each part of a task that launches too much; and operations of a layer by kind of task."""
    failed, counts = [], {}
    with on_cuda(monkeypatch):
        for name, launch in launches(request):
            parts = operations(launch)
            layer = parts[1]  # from the end of the first layer to that of the second
            counts[name] = len(layer)
            beside = sum(map(len, parts)) - LAYERS * len(layer)
            picked = launch.selection is not None and len(launch.selection.runs()) > 1
            most = MOST_BESIDE + (MOST_OF_PICKING if picked else 0)
            if len(layer) > MOST_A_LAYER:
                failed.append("\n  ".join((f"{name}: {len(layer)} a layer, at most {MOST_A_LAYER}", *layer)))
            if beside > most:
                rest = [*parts[0], "...", *parts[-2], *parts[-1]]
                failed.append("\n  ".join((f"{name}: {beside} beside the layers, at most {most}", *rest)))
    return failed, counts


WAYS = [
    {"order": "step_first"},
    {"order": "step_first", "fuse_cache_denoise": True},
    {"order": "stream"},
    {"order": "stream", "batch": 2},
    {"order": "wavefront"},
    {"order": "wavefront", "fuse_cache_denoise": True},
    {"order": "block_first"},
    {"order": "stream", "kv_source": "next_step"},
    {"order": "wavefront", "kv_source": "next_step"},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_operations_of_a_visit(options, monkeypatch):
    failed, counts = too_many(changed(REQUEST, **options), monkeypatch)
    assert counts and not failed, "\n" + "\n".join(failed)
    if options.get("kv_source"):
        assert any("shared" in name for name in counts)


def test_a_long_prompt_costs_no_more(monkeypatch):
    """Its attention is one launch, which takes the counts of the keys."""
    long = changed(REQUEST, config=replace(REQUEST.config, text_len=400), text_tokens=300)
    failed, counts = too_many(long, monkeypatch)
    assert not failed and set(counts.values()) == {14}, failed


def test_one_copy_more_is_too_many(monkeypatch):
    """The gate sees what a change may bring in: copies, conversions, operands that no kernel reads where they lie."""
    attention = transformer.attention

    def copying(q, *args, **options):
        return attention(q.clone().to(torch.float32).to(q.dtype), *args, **options)

    monkeypatch.setattr(transformer, "attention", copying)
    failed, counts = too_many(REQUEST, monkeypatch)
    assert set(counts.values()) == {17} and all("aten.clone" in line for line in failed) and failed
    monkeypatch.setattr(transformer, "attention", attention)
    norm = transformer.rms_norm
    monkeypatch.setattr(transformer, "rms_norm", lambda x, *a, **o: norm(x.mT.contiguous().mT, *a, **o))
    failed, counts = too_many(REQUEST, monkeypatch)
    assert set(counts.values()) == {16} and all("copy of [1, 72, 256] for hiar.rms_norm" in line for line in failed)
