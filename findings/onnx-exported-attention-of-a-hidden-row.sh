#!/usr/bin/env bash
# A hidden row of attention is 0 in torch, the mean of all values in its ONNX export, and NaN with a float mask.
#
# scaled_dot_product_attention gives 0 for a query whose keys are all masked (padding of a batch, the first frames of a
# window), and the exporter of torch 2.13.0 knows: it puts IsNaN and Where behind the softmax. A guess is that the
# exported model agrees, or fails. At the default opset (20) a bool mask becomes 0 and -3.4e38 before it is added, so no
# NaN comes up, softmax gives every key the same weight, and the row is the mean of the values, masked ones and padding
# included. A float mask of 0 and -inf has no such Where: the row is NaN. Only from opset_version=23 on, where the
# export is one Attention node, is it 0, in onnxruntime 1.32.0 and in ONNX's own reference alike. The old exporter
# (dynamo=False) agrees with torch for a bool mask. Rows that see a key are right in all. Seen on 2026-11-28, Linux
# x86-64, Python 3.11, onnx 1.23.2, onnxscript 0.7.2.
#
# Needs python3 (3.11 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/hidden.py" <<'PY'
import io
import logging
import sys
import warnings

import numpy as np
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.set_num_threads(1)
torch.manual_seed(0)


class Attention(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


q, k, v = torch.randn(3, 1, 1, 2, 4)
bools = torch.tensor([[True, True], [False, False]])
masks = {"bool mask": bools, "float mask": torch.where(bools, 0.0, -torch.inf)}
mean = v[0, 0].mean(0).numpy()


def name(row):
    if np.isnan(row).all():
        return "NaN"
    return "0" if not row.any() else "the mean" if np.allclose(row, mean, atol=1e-6) else "other numbers"


wrong = False
for kind, mask in masks.items():
    exact = Attention()(q, k, v, mask).numpy()
    print(f"torch, {kind}: {name(exact[0, 0, 1])}")
    wrong |= name(exact[0, 0, 1]) != "0"
    without = {"bool mask": "the mean", "float mask": "NaN"}[kind]
    for opset, expected in ((None, without), (18, without), (22, without), (23, "0")):
        proto = torch.onnx.export(Attention(), (q, k, v, mask), opset_version=opset, verbose=False).model_proto
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), (q, k, v, mask), strict=True)}
        ran, reference = session.run(None, feed)[0], ReferenceEvaluator(proto).run(None, feed)[0]
        rows = name(ran[0, 0, 1]), name(reference[0, 0, 1])
        number = proto.opset_import[0].version
        print(f"  opset {number}{' (default)' if opset is None else ''}: onnxruntime {rows[0]}, reference {rows[1]}")
        wrong |= rows != (expected, expected) or not np.allclose(ran[0, 0, 0], exact[0, 0, 0], atol=1e-5)
        wrong |= opset is None and number != 20
file = io.BytesIO()
torch.onnx.export(Attention(), (q, k, v, bools), file, dynamo=False, opset_version=17)
session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), (q, k, v, bools), strict=True)}
old = name(session.run(None, feed)[0][0, 0, 1])
print(f"old exporter, bool mask: {old}")
if wrong or old != "0":
    sys.exit("changed: described as the mean, NaN, and 0 from opset 23 on")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
"$folder/venv/bin/python" "$folder/hidden.py"
echo "as described"
