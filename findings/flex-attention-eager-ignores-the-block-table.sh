#!/usr/bin/env bash
# flex_attention with a BlockMask of block numbers alone: eager attends to everything, compiled code to the blocks.
#
# A BlockMask is a table of key blocks for each query block, and a mask_mod for what lies inside them. Block-sparse
# attention for video builds the table itself: BlockMask.from_kv_blocks(counts, indices), whose mask_mod is optional. A
# guess is that eager is the slow reference of compiled code. In torch 2.13.0 eager never looks at the table: it applies
# mask_mod to all keys, so without one nothing is masked, and the result is dense attention; a debugger, a CPU test or a
# fall-back without torch.compile computes another model, without an error. The other way round too: if mask_mod reads a
# tensor (a length, frame numbers) that is written to after create_block_mask, eager follows it at once, and compiled
# code keeps the table: a length of 128 that grows to 256 stays 128, and one that shrinks to 64 stays 128 too, since
# full blocks are computed without mask_mod. Seen on 2026-11-28, Linux x86-64, Python 3.11, g++ 12.2, on a CPU.
#
# Needs g++, python3 (3.10 to 3.13) with venv, and a package index, on a processor with AVX2. Fails if torch behaves
# otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/blocks.py" <<'PY'
import sys
import warnings

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as dense

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 512, 32)
diagonal = torch.block_diag(*[torch.ones(128, 128)] * 4).bool()
wrong = False


def check(name, result, expected, candidates):
    global wrong
    near = [label for label, exact in candidates.items() if (result - exact).abs().max() < 1e-4]
    print(f"{name}: {near[0] if near else 'none of these'}")
    wrong |= near != [expected]


with torch.no_grad():
    compiled = torch.compile(flex_attention, dynamic=False)
    indices = torch.zeros(1, 1, 4, 4, dtype=torch.int32)
    indices[0, 0, :, 0] = torch.arange(4)
    table = BlockMask.from_kv_blocks(torch.ones(1, 1, 4, dtype=torch.int32), indices, BLOCK_SIZE=128)
    candidates = {"all keys": dense(q, k, v), "its own block": dense(q, k, v, attn_mask=diagonal)}
    check("table alone, eager", flex_attention(q, k, v, block_mask=table), "all keys", candidates)
    check("table alone, compiled", compiled(q, k, v, block_mask=table), "its own block", candidates)

    length = torch.tensor(128)
    table = create_block_mask(lambda b, h, i, j: j < length, None, None, 512, 512, device="cpu")
    candidates = {n: dense(q, k[:, :, :n], v[:, :, :n]) for n in (64, 128, 256)}
    for now in (128, 256, 64):
        length.fill_(now)
        check(f"length 128, then {now}: keys in eager", flex_attention(q, k, v, block_mask=table), now, candidates)
        check(f"length 128, then {now}: keys compiled", compiled(q, k, v, block_mask=table), 128, candidates)
if wrong:
    sys.exit("changed: described as mask_mod alone in eager, and the table first when compiled")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/blocks.py"
echo "as described"
