#!/usr/bin/env bash
# diffusers: model.set_attention_backend() changes every other model of the process too, and its reset does not undo that.
#
# The method's text says "Set the attention backend for the model". In diffusers 0.42.1 it also makes that backend the
# default of the process, which all models without one of their own take; reset_attention_backend() clears the model's own
# choice and leaves the default. So a backend that is tried on one transformer also runs in the VAE and in every pipeline
# that is loaded later. The context manager attention_backend() does restore the default. Seen on 2026-11-28, Linux
# x86-64, Python 3.11, torch 2.13.0 (CPU).
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if the version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/backend.py" <<'PY'
import sys

import diffusers
from diffusers import WanTransformer3DModel
from diffusers.models import attention_dispatch


def tiny():
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, ffn_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8,
    )


def default():
    return attention_dispatch._AttentionBackendRegistry.get_active_backend()[0].value


one, other = tiny(), tiny()
seen = [default()]
one.set_attention_backend("_native_math")
seen.append(default())
one.reset_attention_backend()
seen.append(default())
own = {processor._attention_backend for processor in other.attn_processors.values()}
print(f"diffusers {diffusers.__version__}: default before, after set, after reset of one model: {seen}; another's own: {own}")
if seen != ["native", "_native_math", "_native_math"] or own != {None}:
    sys.exit("changed: described are native, _native_math, _native_math, and none of the other model's own")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    "torch==2.13.0" "numpy==2.2.6" "diffusers==0.42.1" "transformers==5.23.0"
"$folder/venv/bin/python" "$folder/backend.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
echo "as described"
