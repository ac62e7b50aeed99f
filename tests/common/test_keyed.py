"""Keyed random numbers: fixed for ever, on every processor; what was made with others is refused."""

from __future__ import annotations

import importlib
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import count_calls

from hiar_model.common.keyed import KeyedGenerator, _log, _normals, keyed_generator
from hiar_model.rollout.noise import keyed_noise
from hiar_model.train.engine.networks import make_network
from hiar_model.version import NOISE, require_noise

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]

# Of one machine, by float.hex: every other one must find the same bits.
EXPECTED = """\
normals 0x1.92a6a20000000p-6 0x1.54f4720000000p-1 -0x1.8847640000000p+0 -0x1.50e2a20000000p+0
noise 0x1.56d2c80000000p-1 -0x1.21c05a0000000p+1 0x1.0133120000000p+0
uniform 0x1.fad9060000000p-1 0x1.67926c0000000p-1
uniform64 0x1.fad906c9d995fp-1 0x1.67926dd2016cfp-1
whole 989 702 606 12
all 7b22b71a49c71ed3113beaead0105d09e8cf9ce6a21783805d233ae79480811e
"""

TELL = """
import hashlib, torch
from hiar_model.common.keyed import keyed_generator
from hiar_model.rollout.noise import keyed_noise
from hiar_model.train.engine.networks import make_network
def tell(name, x): print(name, *(float(v).hex() for v in x.flatten().tolist()))
tell("normals", keyed_generator(0, "teacher", 3, 5).normals(4))
tell("noise", keyed_noise(7, 1, -1, 2, (1, 1, 1, 3)))
tell("uniform", keyed_generator(0, "a").uniform(2))
tell("uniform64", keyed_generator(0, "a").uniform(2, dtype=torch.float64))
print("whole", *keyed_generator(0, "a").whole(1000, 4).tolist())
block = keyed_noise(2**40 + 7, 0, 3, 11, (3, 16, 60, 104))  # tails of six standard deviations among them
weights = make_network("toy", seed=5).state_dict()
bits = b"".join(x.numpy().tobytes() for x in (block, *(weights[name] for name in sorted(weights))))
print("all", hashlib.sha256(bits).hexdigest())
"""


def told(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TELL],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def instruction_sets() -> list[dict[str, str]]:
    """Environments in which numpy and torch use other code, as far as this processor has it."""
    core = importlib.import_module(f"numpy.{'_core' if hasattr(np, '_core') else 'core'}._multiarray_umath")
    there = [name for name in core.__cpu_dispatch__ if core.__cpu_features__[name]]
    some = {"half": there[len(there) // 2 :], "none": there}
    return [
        {"NPY_DISABLE_CPU_FEATURES": " ".join(some[numpy]), "ATEN_CPU_CAPABILITY": torch_}
        for numpy, torch_ in (("half", "avx2"), ("none", "default"))
    ]


def test_a_key_gives_the_same_numbers_for_ever(capsys):
    """Pinned: others would give every resumed run other batches and every seed another video."""
    exec(TELL, {})
    assert capsys.readouterr().out == EXPECTED


@pytest.mark.parametrize("case", [0, 1])
def test_numbers_are_the_same_on_every_instruction_set(case):
    assert told(**instruction_sets()[case]) == EXPECTED


def test_normals_are_normal():
    normal = statistics.NormalDist()
    ks = [round(f * 2**52) for f in (1e-15, 1e-11, 1e-8, 1e-4, 0.01, 0.0749, 0.0751, 0.3, 0.5, 0.7, 0.93, 0.9999999)]
    actual = _normals(np.array([k << 12 for k in [0, *ks, 2**52 - 1]], np.uint64)).astype(float)
    assert actual[0] == -actual[-1] == pytest.approx(-8.20953, abs=1e-4)  # the ends: one draw in 2**52
    expected = np.array([normal.inv_cdf((k + 0.5) / 2**52) for k in ks])
    assert np.abs(actual[1:-1] - expected)[1:].max() < 2e-6 and abs(actual[1] - expected[0]) < 1e-4
    draws = keyed_generator(1).normals(1_000_000).double()
    moments = [float((draws**n).mean()) for n in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.02)  # four standard errors of the fourth
    ranks = (draws.sort().values * 0.5**0.5).erf().add(1).div(2)
    assert float((ranks - (torch.arange(1_000_000) + 0.5) / 1_000_000).abs().max()) < 1.63e-3  # Kolmogorov, 1 in 100
    p = np.random.default_rng(0).uniform(0, 0.075, 1000)
    assert np.abs(_log(p) - np.log(p)).max() < 1e-13


def test_uniform_and_whole_numbers():
    for dtype, digits in ((torch.float32, 24), (torch.float64, 53)):
        drawn = keyed_generator(0, "u").uniform(100_000, dtype=dtype)
        assert drawn.dtype == dtype and float(drawn.min()) >= 0 and float(drawn.max()) < 1
        assert torch.equal((drawn.double() * 2**digits).frac(), torch.zeros(100_000, dtype=torch.float64))
        assert float(drawn.double().mean()) == pytest.approx(0.5, abs=4e-3)
    counts = keyed_generator(0, "w").whole(7, 70_000).bincount()
    assert len(counts) == 7 and int((counts - 10_000).abs().max()) < 400
    with pytest.raises(ValueError, match=r"below must be in 1\.\.2\*\*32, got 0"):
        keyed_generator(0).whole(0)


def test_keys_are_kept_apart():
    keys = [
        (0, "a", 1, 2),
        (1, "a", 1, 2),
        (0, "b", 1, 2),
        (0, "a", 2, 1),
        (0, "a", "1", 2),
        (0, "a", 12),
        (0, "a1", 2),
    ]
    keys += [(0, "ab", "c"), (0, "a", "bc"), (0, "a/1", 2), (0, "a", 1, 2, "")]
    assert len({float(keyed_generator(*key).normals()) for key in keys}) == len(keys)
    noises = itertools.product((0, 2**32, -1), (0, 2**40), (-1, 0), (0, 1))
    assert len({float(keyed_noise(*key, (1,))) for key in noises}) == 24


def test_every_bit_of_a_key_counts():
    """All 128: of 32 bits a pair among 77,000 keys is as likely as not."""
    keys = [0, *(1 << bit for bit in range(128))]
    assert len({float(KeyedGenerator(key.to_bytes(16, "little")).normals()) for key in keys}) == 129
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hiar_model.common.keyed.KeyedGenerator", lambda key: sizes.append(len(key)))
        keyed_generator(0, "noise")
    assert sizes == [16]


def test_whole_seeds_count():
    """Two seeds that agree in their low 32 bits are two seeds, for noise and for weights."""
    assert not torch.equal(keyed_noise(7, 0, -1, 0, (4,)), keyed_noise(7 + 2**32, 0, -1, 0, (4,)))
    one, other = (make_network("toy", seed=seed).state_dict() for seed in (7, 7 + 2**32))
    same = [name for name in one if torch.equal(one[name], other[name])]
    assert all(float(one[name].std(correction=0)) == 0 for name in same)  # gates of zero, norms of one
    assert len(same) < len(one) / 2


def test_neighbouring_keys_are_independent():
    draws = torch.stack([keyed_generator(0, "x", 7, row).normals(2000) for row in range(20)])
    correlation = torch.corrcoef(draws) - torch.eye(20)
    assert float(correlation.abs().max()) < 5 / 2000**0.5


@pytest.mark.parametrize("part", [1.0, True, None, ("a",)])
def test_a_key_of_another_kind_is_refused(part):
    with pytest.raises(ValueError, match="made of whole numbers and texts, got"):
        keyed_generator(0, part)


def test_whole_numbers_of_any_kind_are_one_key():
    assert torch.equal(keyed_noise(np.int64(3), torch.tensor(1), -1, np.uint8(2), (2,)), keyed_noise(3, 1, -1, 2, (2,)))


def test_a_block_is_drawn_at_once():
    """The 299,520 numbers of a block of 480p take 817 calls."""
    keyed_noise(0, 0, 0, 0, (1,))
    assert count_calls(lambda: keyed_noise(0, 0, 1, 0, (3, 16, 60, 104))) < 2000


@pytest.mark.parametrize(("noise", "named"), [(None, "torch-32"), ("new-256", "new-256")])
def test_another_scheme_is_refused(noise, named):
    require_noise("v.json", NOISE)
    with pytest.raises(ValueError, match=rf"^v\.json: its noise is '{named}', this version draws 'philox-128' and"):
        require_noise("v.json", noise)
