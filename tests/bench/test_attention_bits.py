"""bench.studies.attention_bits: what it calls "as built" is the op."""

from __future__ import annotations

import pytest
import torch

from bench.studies import attention_bits as study

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, size in (("SLOTS", 3), ("TOKENS", 128), ("WIDTH", 32), ("QUERIES", 20)):
        monkeypatch.setattr(study, name, size)


def test_as_built_is_the_op():
    q, k, v = study.drawn("peaked (q x 4)", 0)
    for eight, name in (
        (True, "products of 8 bits, as built"),
        (False, "16-bit products over an 8-bit ring, as built"),
    ):
        actual = study.attend(study.VARIANTS[name], q, k, v)
        torch.testing.assert_close(actual, study.as_built(q, k, v, eight), rtol=1e-4, atol=1e-5)


def test_the_table():
    head, _, *lines = study.table(2, ("normal", "K with a mean"))
    assert head.count("|") == 4 and [line.split("|")[1].strip() for line in lines] == list(study.VARIANTS)
    mean = {line.split("|")[1].strip(): [float(cell.split()[0]) for cell in line.split("|")[2:4]] for line in lines}
    built, without = mean["products of 8 bits, as built"], mean["mean of K off"]
    assert built[1] > 1.5 * without[1]  # all keys share a vector, which softmax does not see
    assert mean["only V in 8 bits"][0] < mean["16-bit products over an 8-bit ring, as built"][0] < built[0]


def test_heads_of_a_model():
    heads = study.of_model("toy", 2)
    assert [tuple(x.shape) for x in heads[0]] == [(48, 64), (12, 16, 64), (12, 16, 64)] and len(heads) == 2
