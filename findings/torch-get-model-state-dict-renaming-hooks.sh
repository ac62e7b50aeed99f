#!/usr/bin/env bash
# torch.distributed.checkpoint.state_dict reads no model whose state-dict hooks rename keys, and writes one.
#
# A module keeps one tensor and shows it to checkpoints as three (register_state_dict_post_hook splits it,
# register_load_state_dict_pre_hook joins it). state_dict() and load_state_dict() agree, and set_model_state_dict loads
# the same keys; get_model_state_dict raises AttributeError: 'Fused' object has no attribute 'q', because it follows each
# key of state_dict() as a path of attributes. So a state that the setter takes cannot be had from the getter.
# get_optimizer_state_dict follows parameters, and works. No process group is needed to see it.
# Seen on 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0 (CPU).
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/hooks.py" <<'PY'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)


class Fused(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.arange(12.0).reshape(6, 2) + start)
        self.register_state_dict_post_hook(self.split)
        self.register_load_state_dict_pre_hook(self.join)

    @staticmethod
    def split(module, state, prefix, metadata):
        for name, third in zip("qkv", state.pop(prefix + "qkv").chunk(3)):
            state[prefix + name] = third

    @staticmethod
    def join(module, state, prefix, *others):
        state[prefix + "qkv"] = torch.cat([state.pop(prefix + name) for name in "qkv"])


source, target = nn.Sequential(Fused(0)), nn.Sequential(Fused(100))
assert sorted(source.state_dict()) == ["0.k", "0.q", "0.v"]
set_model_state_dict(target, source.state_dict())
assert torch.equal(source[0].qkv, target[0].qkv)
print("set_model_state_dict: loaded")

optimizer = torch.optim.AdamW(source.parameters())
source[0].qkv.sum().backward()
optimizer.step()
assert list(get_optimizer_state_dict(source, optimizer)["state"]) == ["0.qkv"]
print("get_optimizer_state_dict: by parameter")

try:
    get_model_state_dict(source)
except AttributeError as error:
    print("get_model_state_dict: AttributeError:", error)
    assert str(error) == "'Fused' object has no attribute 'q'"
else:
    raise SystemExit("changed: get_model_state_dict reads it")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/hooks.py"
echo "as described"
