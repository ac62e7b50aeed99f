#!/usr/bin/env bash
# AdamW with lr 2e-6 and weight_decay 0.01 decays no float32 weight at all, and in bfloat16 no lr up to 0.01 does.
#
# AdamW multiplies each weight by 1 - lr * weight_decay before its step. A guess is that a small decay is a small one:
# 2e-8 per step, 2% in a million steps. In torch 2.13.0 that factor is rounded to the dtype of the weights first: in
# float32 it is 1 if lr * weight_decay is less than 2^-25 = 3e-8, and then weight_decay=0.01 gives bit for bit what 0
# gives, for ever, with gradients and without, for-loop, foreach and fused. Fine-tuning and distillation use such rates.
# In bfloat16 the factor is not, but the product is: no weight changes unless lr * weight_decay is above 2^-9, so with
# lr 1e-3 and weight_decay 0.1 the default AdamW decays nothing, where 2,000 steps should take 18%. fused=True is
# another optimiser there: it rounds once, after decay and step, so it has the 18% while gradients move the weight, and
# none where they are 0. Adding weight_decay * weight to the update, as optax 0.2.8 does, loses nothing in float32 as
# long as the update itself is not lost. Seen on 2026-11-28, Linux x86-64, Python 3.11, on a CPU.
#
# Needs python3 (3.11 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/decay.py" <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

torch.set_num_threads(1)
STEPS, COUNT, START = 2000, 1000, 0.02
GRADIENTS = torch.randn(STEPS, COUNT, generator=torch.Generator().manual_seed(1))


def weights(dtype, lr, decay, noise=True, **options):
    """Weights after 2,000 steps from 0.02."""
    w = torch.full((COUNT,), START, dtype=dtype, requires_grad=True)
    adamw = torch.optim.AdamW([w], lr=lr, weight_decay=decay, **options)
    for gradient in GRADIENTS:
        w.grad = (gradient if noise else torch.zeros(COUNT)).to(dtype)
        adamw.step()
    return w.detach()


wrong = False
forms = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
for name, options in forms.items():
    none = torch.equal(weights(torch.float32, 2e-6, 0.01, **options), weights(torch.float32, 2e-6, 0.0, **options))
    some = torch.equal(weights(torch.float32, 2e-6, 0.1, **options), weights(torch.float32, 2e-6, 0.0, **options))
    print(f"float32, lr 2e-6, {name}: decay 0.01 is bit for bit decay 0: {none}, decay 0.1: {some}")
    wrong |= not none or some
for name, options in forms.items():
    pair = [weights(torch.bfloat16, 1e-3, decay, **options) for decay in (0.1, 0.0)]
    still = weights(torch.bfloat16, 1e-3, 0.1, noise=False, **options).float().mean().item() / START
    ratio = (pair[0].double().mean() / pair[1].double().mean()).item()
    same = torch.equal(*pair)
    print(f"bfloat16, lr 1e-3, {name}: decay 0.1 leaves {ratio:.3f} of decay 0, bit for bit: {same}; "
          f"without gradients {still:.3f}")
    wrong |= same != (name != "fused") or abs(still - 1) > 0.01 or (name == "fused" and not 0.78 < ratio < 0.86)


def by_optax(decay):
    adamw = optax.adamw(2e-6, weight_decay=decay)

    def step(carry, gradient):
        updates, state = adamw.update(gradient, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    w = jnp.full(COUNT, START)
    return np.asarray(jax.lax.scan(step, (w, adamw.init(w)), jnp.asarray(GRADIENTS.numpy()))[0][0], np.float64)


lost = 1 - by_optax(0.01).mean() / by_optax(0.0).mean()
print(f"float32, lr 2e-6, optax: decay 0.01 takes {lost:.1e}, of {STEPS * 2e-8:.1e}")
wrong |= not 0.5 < lost / (STEPS * 2e-8) < 1.5
if wrong:
    sys.exit("changed: described as no decay")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 jax==0.10.2 optax==0.2.8
"$folder/venv/bin/python" "$folder/decay.py"
echo "as described"
