#!/usr/bin/env bash
# jax.random.normal in bfloat16 draws one of 128 numbers, none above 2.52; the mean of gumbel is 0.52, not 0.58.
#
# Noise in bfloat16 is expected to be float32 noise that is rounded, with tails beyond 4; torch 2.13.0's is (CPU: 4,000
# different numbers in 4 million, up to 5). In JAX 0.10.2 the dtype is that of the whole computation: a uniform number
# of 7 random bits goes through the inverse of the distribution, so normal has 128 different numbers between -2.89 and
# 2.52, with a mean of -0.011; exponential and gumbel never exceed 4.85, and the mean of gumbel is 9% too small. float16
# has 1,024 numbers, between -3.49 and 3.18. normal(key, shape).astype(bfloat16) is right, and other noise for the same
# key. Seen on 2026-11-28, Linux x86-64, Python 3.11, on a CPU.
#
# Needs python3 (3.11 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/noise.py" <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch

torch.set_num_threads(1)
SHAPE, KEY = (1 << 22,), jax.random.key(0)


def describe(name, x, distinct, least, most, mean, tolerance):
    x = np.asarray(x).astype(np.float64)
    count = len(np.unique(x))
    print(f"{name}: {count} numbers, {x.min():.3f} to {x.max():.3f}, mean {x.mean():.4f}")
    few = count == distinct if distinct < 2000 else count > distinct
    return few and abs(x.min() - least) < 0.02 and abs(x.max() - most) < 0.02 and abs(x.mean() - mean) < tolerance


right = [
    describe("normal, bfloat16", jax.random.normal(KEY, SHAPE, jnp.bfloat16), 128, -2.891, 2.516, -0.011, 0.002),
    describe("normal, float16", jax.random.normal(KEY, SHAPE, jnp.float16), 1024, -3.486, 3.182, -0.002, 0.002),
    describe("gumbel, bfloat16", jax.random.gumbel(KEY, SHAPE, jnp.bfloat16), 128, -4.469, 4.844, 0.525, 0.003),
    describe("exponential, bfloat16", jax.random.exponential(KEY, SHAPE, jnp.bfloat16), 128, 0, 4.844, 0.975, 0.003),
]
wide = jax.random.normal(KEY, SHAPE)
rounded = np.asarray(wide.astype(jnp.bfloat16)).astype(np.float64)
narrow = np.asarray(jax.random.normal(KEY, SHAPE, jnp.bfloat16)).astype(np.float64)
of_torch = torch.randn(SHAPE, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).double().numpy()
for name, x in (("normal, float32, then rounded", rounded), ("torch.randn, bfloat16", of_torch)):
    print(f"{name}: {len(np.unique(x))} numbers, {x.min():.3f} to {x.max():.3f}, mean {x.mean():.4f}")
    right.append(len(np.unique(x)) > 3500 and x.max() > 4.5 and abs(x.mean()) < 0.002)
correlation = np.corrcoef(rounded, narrow)[0, 1]
gumbel = float(jax.random.gumbel(KEY, SHAPE).mean())
print(f"the same key in both dtypes: correlation {correlation:.3f}; gumbel in float32: mean {gumbel:.3f}")
right += [abs(correlation) < 0.01, abs(gumbel - 0.577) < 0.003]
if not all(right):
    sys.exit("changed: described as 128 numbers")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 jax==0.10.2
"$folder/venv/bin/python" "$folder/noise.py"
echo "as described"
