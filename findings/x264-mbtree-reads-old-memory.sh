#!/usr/bin/env bash
# x264: the same frames become other files, by what lay in memory before; without its macroblock tree they do not.
#
# x264 is known to give the same file for the same frames and options, with any number of threads. In PyAV 18.1.0's
# libx264 with the presets' macroblock tree (mbtree) and B-frames the file depends on bytes that nobody wrote: in a fresh
# process, whose memory is zeros, it is always the same, and in one that has worked for a while now and then another one.
# glibc's MALLOC_PERTURB_, which fills new memory, shows it: seven frames of 480x832 become two files; with mbtree=0 it is
# one. So another hash of an mp4 does not mean other frames. Seen on 2026-11-29, Linux x86-64 with glibc, Python 3.11,
# on a CPU.
#
# Needs python3 (3.11 to 3.13) with venv, glibc, and a package index. Fails if this version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/encode.py" <<'PY'
import hashlib
import io
import os
import subprocess
import sys

import av
import numpy as np

if len(sys.argv) == 1:
    results = {}
    for tree in ("1", "0"):
        for fill in ("0", "1", "85"):
            words = [sys.executable, __file__, tree]
            environment = {**os.environ, "MALLOC_PERTURB_": fill}
            line = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()
            print(f"mbtree {tree}, new memory filled by {fill:>2}: {line}")
            results.setdefault(tree, []).append(line.split())
    frames = {line[1] for lines in results.values() for line in lines}
    files = {tree: len({line[3] for line in lines}) for tree, lines in results.items()}
    print("files:", files)
    if len(frames) != 1 or files != {"1": 2, "0": 1}:
        sys.exit("changed: described as two files with mbtree and one without")
else:
    frames, digest = np.random.default_rng(0).integers(0, 255, (7, 480, 832, 3), np.uint8), hashlib.sha256()
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "16", "mbtree": sys.argv[1]})
        stream.width, stream.height, stream.pix_fmt = 832, 480, "yuv420p"
        for frame in frames:
            yuv = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
            digest.update(yuv.to_ndarray().tobytes())
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    print("frames", digest.hexdigest()[:8], "file", hashlib.sha256(file.getvalue()).hexdigest()[:8])
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: av==18.1.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/encode.py"
echo "as described"
