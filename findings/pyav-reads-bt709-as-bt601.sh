#!/usr/bin/env bash
# A clip that says it is BT.709 comes out of PyAV 16.1 in BT.601's colours.
#
# A decoded frame whose own `colorspace` is 1 (BT.709), to_ndarray(format="rgb24"): PyAV 16.1.0 converts by BT.601 all the
# same, even with src_colorspace="ITU709" (185, 23, 41 for a clip of 200, 40, 40: 17 of 255 off; an untagged frame obeys the
# argument). PyAV 18.1.0 goes by the frame: 199, 39, 40. Seen on 2026-11-27, Linux x86-64, Python 3.11.
#
# Needs python3 (3.11 to 3.13) with venv, and a package index. Fails if either version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/read.py" <<'PY'
import sys

import av
import numpy as np

path = sys.argv[1]
with av.open(path, "w") as out:
    stream = out.add_stream("libx264", rate=16, options={"crf": "4"})
    stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = 1
    image = np.full((720, 1280, 3), (200, 40, 40), np.uint8)
    for _ in range(3):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
        out.mux(stream.encode(frame))
    out.mux(stream.encode())
with av.open(path) as source:
    frame = next(source.decode(video=0))
    plain = frame.to_ndarray(format="rgb24")[360, 640].tolist()
    told = frame.to_ndarray(format="rgb24", src_colorspace="ITU709")[360, 640].tolist()
print(int(frame.colorspace), *plain, *told)
PY

for version in 16.1.0 18.1.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "av==$version" "numpy==2.2.6"
    read -r tag r g b told_r told_g told_b < <("$folder/$version/bin/python" "$folder/read.py" "$folder/$version.mp4")
    echo "PyAV $version: tag $tag, by itself $r $g $b, told ITU709 $told_r $told_g $told_b"
    case $version in
        16.1.0) expected="1 185 23 41 185 23 41" ;;
        *) expected="1 199 39 40 199 39 40" ;;
    esac
    python3 - $tag $r $g $b $told_r $told_g $told_b $expected <<'PY'
import sys

numbers = list(map(int, sys.argv[1:]))
found, expected = numbers[:7], numbers[7:]
if any(abs(a - b) > 3 for a, b in zip(found, expected)):
    sys.exit(f"changed: {found}, described: {expected}")
PY
done
echo "as described"
