#!/usr/bin/env bash
# torch's FlopCounterMode counts no attention on a CPU, and nothing of nn.MultiheadAttention in eval mode.
#
# FlopCounterMode is how the work of a network is measured, and a guess is that it counts what was computed, wherever it
# runs. In torch 2.13.0 it knows a list of operators, and on a CPU scaled_dot_product_attention is another one than
# those of CUDA: it and its backward count 0, causal or masked, without a warning. In a video transformer that is most
# of the work. On the meta device, and under sdpa_kernel(MATH), the same call counts 4 T^2 D per head.
# nn.MultiheadAttention in eval mode without gradient is one fused operator and counts 0 with all its projections; a
# product of a matrix and a vector, and torch._int_mm, are no FLOPs either. Linear, einsum, conv3d are right. Seen on
# 2026-11-28, Linux x86-64, Python 3.11.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/count.py" <<'PY'
import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)
wrong = False


def check(name, function, expected):
    global wrong
    with FlopCounterMode(display=False) as counter:
        function()
    count = counter.get_total_flops()
    print(f"{name}: {count:,}")
    wrong |= count != expected


q = torch.randn(1, 2, 64, 32)
attention = 2 * 4 * 64 * 64 * 32
trained, on_meta = q.clone().requires_grad_(), q.to("meta")
check("attention on a CPU", lambda: F.scaled_dot_product_attention(q, q, q), 0)
check("attention on a CPU, causal", lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), 0)
mask = torch.ones(64, 64, dtype=torch.bool)
check("attention on a CPU, masked", lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask), 0)
check("and its backward", lambda: F.scaled_dot_product_attention(trained, trained, trained).sum().backward(), 0)
with sdpa_kernel(SDPBackend.MATH):
    check("attention on a CPU, MATH", lambda: F.scaled_dot_product_attention(q, q, q), attention)
check("attention on meta", lambda: F.scaled_dot_product_attention(on_meta, on_meta, on_meta), attention)

tokens, heads = torch.randn(1, 64, 32), nn.MultiheadAttention(32, 2, batch_first=True)
projections = 2 * 64 * 32 * 32 * 4
check("nn.MultiheadAttention in training", lambda: heads(tokens, tokens, tokens, need_weights=False), projections)
with torch.no_grad():
    heads.eval()
    check("nn.MultiheadAttention in eval", lambda: heads(tokens, tokens, tokens, need_weights=False), 0)

a, bytes_ = torch.randn(16, 16), torch.ones(32, 16, dtype=torch.int8)
check("matrix times vector", lambda: a @ a[0], 0)
check("torch._int_mm", lambda: torch._int_mm(bytes_, bytes_[:16]), 0)
check("linear", lambda: F.linear(a, a), 2 * 16**3)
video, weight = torch.randn(1, 4, 5, 8, 8), torch.randn(8, 4, 3, 3, 3)
check("conv3d", lambda: F.conv3d(video, weight, padding=1), 2 * 8 * 4 * 27 * 5 * 64)
if wrong:
    sys.exit("changed: described as 0 for attention on a CPU")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/count.py"
echo "as described"
