#!/usr/bin/env bash
# PyAV: with B-frames the first frame of a fragmented mp4 is shown at 0.08 s, two frames late, and not at 0.
#
# Frames of a clip are given pts 0, 1, 2, ... of 25 per second; in a plain mp4 the first one is at 0. A guess is that
# movflags for streaming (frag_keyframe, empty_moov) only arrange the boxes otherwise. In PyAV 18.1.0 with libx264's
# B-frames all times in such a file are later by the two frames that decoding runs ahead: a plain mp4 takes that back
# with an edit list, and the index in front of a fragmented one is written before the first packet is known. So the same
# video is 0.08 s late beside its sound or beside a second file; movflags=cmaf leaves one frame of it, and mpegts and
# flv have two. delay_moov, or bf=0, puts the first frame at 0. With empty_moov stream.frames is 0 as well, with
# frag_keyframe alone it is right. Seen on 2026-11-28, Linux x86-64, Python 3.11.
#
# Needs python3 (3.11 to 3.13) with venv, and a package index. Fails if this version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/starts.py" <<'PY'
import io
import sys
from fractions import Fraction

import av
import numpy as np

RATE, COUNT = 25, 25


def written(container: str, movflags: str = "", bf: int = 2) -> io.BytesIO:
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"movflags": movflags} if movflags else {}) as output:
        stream = output.add_stream("libx264", rate=RATE, options={"bf": str(bf)})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(COUNT):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), i * 9, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    file.seek(0)
    return file


fragments = "frag_keyframe+empty_moov"
changed = False
for container, movflags, bf, first, frames in (
    ("mp4", "", 2, 0, 25),
    ("mp4", "frag_keyframe", 2, 2, 25),
    ("mp4", fragments, 2, 2, 0),
    ("mp4", fragments + "+default_base_moof", 2, 2, 0),
    ("mp4", "cmaf", 2, 1, 0),
    ("mp4", fragments + "+delay_moov", 2, 0, 0),
    ("mp4", fragments, 0, 0, 0),
    ("matroska", "", 2, 0, 0),
    ("mpegts", "", 2, 2, 0),
    ("flv", "", 2, 2, 0),
):
    with av.open(written(container, movflags, bf)) as video:
        stream = video.streams.video[0]
        times = [float(frame.pts * stream.time_base) for frame in video.decode(stream)]
        count = stream.frames
    print(f"{container} {movflags or '-'}, bf={bf}: from {times[0]:.2f} to {times[-1]:.2f} s, stream.frames {count}")
    changed |= len(times) != COUNT or count != frames
    changed |= any(abs(time - (first + i) / RATE) > 0.002 for i, time in enumerate(times))
if changed:
    sys.exit("changed: described as two frames late where fragments begin before the first packet is known")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: av==18.1.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/starts.py"
echo "as described"
