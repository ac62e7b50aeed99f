#!/usr/bin/env bash
# logsumexp's gradient is NaN in a row of -inf alone, logcumsumexp's wherever a row begins with -inf.
#
# logsumexp of a row without a visible entry is -inf, as it should be, and torch's attention gives such rows 0 with
# gradient 0; a guess is that logsumexp's backward is as careful. In torch 2.13.0 and JAX 0.10.2 its gradient is NaN, of
# logaddexp(-inf, -inf) too, and torch.where or nan_to_num behind it do not help: 0 times NaN. So two halves of an
# attention that are merged by their logsumexps train well until one row sees nothing in either. Where one entry is
# finite the gradient of the others is 0, in torch and JAX: only logcumsumexp of torch, all of whose values but the
# first are finite there, has NaN in an entry of -inf at the start of a row (JAX's cumlogsumexp has 0). Seen on
# 2026-11-28, Linux x86-64, Python 3.11, on a CPU.
#
# Needs python3 (3.11 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/gradients.py" <<'PY'
import math
import sys

import jax
import jax.numpy as jnp
import torch

torch.set_num_threads(1)
INF = math.inf
NAN = math.nan


def of_torch(function, numbers):
    x = torch.tensor(numbers, requires_grad=True)
    value = function(x)
    torch.where(value.isfinite(), value, 0).sum().backward()
    return value.detach().tolist(), x.grad.tolist()


def of_jax(function, numbers):
    def loss(x):
        value = function(x)
        return jnp.where(jnp.isfinite(value), value, 0).sum()

    x = jnp.array(numbers)
    return function(x).tolist(), jax.grad(loss)(x).tolist()


hidden, late = [-INF, -INF], [-INF, 0.0, 0.0]
cases = (
    ("torch.logsumexp", of_torch, lambda x: torch.logsumexp(x, 0), hidden, -INF, [NAN, NAN]),
    ("torch.logaddexp", of_torch, lambda x: torch.logaddexp(x[0], x[1]), hidden, -INF, [NAN, NAN]),
    ("torch.logsumexp", of_torch, lambda x: torch.logsumexp(x, 0), late, math.log(2), [0, 0.5, 0.5]),
    ("torch.logcumsumexp, last", of_torch, lambda x: torch.logcumsumexp(x, 0)[-1], late, math.log(2), [NAN, 0.5, 0.5]),
    ("jax.nn.logsumexp", of_jax, jax.nn.logsumexp, hidden, -INF, [NAN, NAN]),
    ("jnp.logaddexp", of_jax, lambda x: jnp.logaddexp(x[0], x[1]), hidden, -INF, [NAN, NAN]),
    ("jax.nn.logsumexp", of_jax, jax.nn.logsumexp, late, math.log(2), [0, 0.5, 0.5]),
    ("jax.lax.cumlogsumexp, last", of_jax, lambda x: jax.lax.cumlogsumexp(x)[-1], late, math.log(2), [0, 0.5, 0.5]),
)
wrong = False
for name, run, function, numbers, value, gradient in cases:
    actual_value, actual = run(function, numbers)
    print(f"{name} of {numbers}: {actual_value:.4f}, gradient {[round(g, 4) for g in actual]}")
    same = all(math.isnan(a) if math.isnan(b) else abs(a - b) < 1e-6 for a, b in zip(actual, gradient, strict=True))
    wrong |= not same or not (actual_value == value or abs(actual_value - value) < 1e-6)
q = torch.randn(1, 1, 2, 8, requires_grad=True)
mask = torch.tensor([[True, True], [False, False]])
out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
out.sum().backward()
finite = bool(q.grad.isfinite().all())
print(f"attention: a hidden row gives {out[0, 0, 1].abs().max():g}, its gradient is finite: {finite}")
if wrong or not finite or out[0, 0, 1].any():
    sys.exit("changed: described as NaN")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 jax==0.10.2
"$folder/venv/bin/python" "$folder/gradients.py"
echo "as described"
