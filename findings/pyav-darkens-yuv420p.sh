#!/usr/bin/env bash
# Every trip of a picture from RGB to yuv420p and back through PyAV is one level darker, in all colours, without end.
#
# yuv420p rounds, and a guess is that its errors cancel out: a colour that has been through it once should come out the
# same the next time. In PyAV 17.0.0 and 18.1.0 to_ndarray(format="rgb24") cuts off instead of rounding: 40 colours,
# each a flat picture of its own, lose 1.2 of 255 on average in one trip, 11 in ten and about 40 in fifty, with no codec in
# between. So a long video whose clips are each continued from the one before fades to black. ACCURATE_RND alone makes it
# worse; ACCURATE_RND | FULL_CHR_H_INT | FULL_CHR_H_INP in both directions is right: no channel is ever off by more than
# 2, after fifty trips too. yuv444p has no such drift. Seen on 2026-11-28, Linux x86-64, Python 3.11.
#
# Needs python3 (3.11 to 3.13) with venv, and a package index. Fails if either version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/trips.py" <<'PY'
import sys

import av
import numpy as np

BILINEAR, FULL_CHR_H_INT, FULL_CHR_H_INP, ACCURATE_RND = 2, 1 << 13, 1 << 14, 1 << 18  # swscale's; 17.0.0 has no names
colours = np.random.default_rng(0).integers(0, 256, (40, 3), dtype=np.uint8)


def after(trips: int, pixels: str, flags: int | None = None) -> np.ndarray:
    """How far each colour is from where it began: [40, 3]."""
    how = {"threads": 1} if flags is None else {"threads": 1, "interpolation": flags}
    images = [np.full((16, 16, 3), colour, np.uint8) for colour in colours]
    for _ in range(trips):
        frames = (av.VideoFrame.from_ndarray(image, format="rgb24") for image in images)
        images = [f.reformat(format=pixels, **how).to_ndarray(format="rgb24", **how) for f in frames]
    return np.stack([image[8, 8] for image in images]).astype(int) - colours


rounded = BILINEAR | ACCURATE_RND
exact = rounded | FULL_CHR_H_INT | FULL_CHR_H_INP
for trips, least, most in ((1, -1.6, -0.8), (10, -14, -8), (50, -60, -30)):
    means = after(trips, "yuv420p").mean(0)
    print(f"{trips} trips, as it is: mean {means.round(1).tolist()}")
    if not np.all((least < means) & (means < most)):
        sys.exit("changed: the mean is another one")
for name, pixels, flags, worst in (("all three flags", "yuv420p", exact, 2), ("yuv444p", "yuv444p", None, 2)):
    off = after(50, pixels, flags)
    print(f"50 trips, {name}: mean {off.mean(0).round(2).tolist()}, largest {abs(off).max()}")
    if abs(off).max() > worst:
        sys.exit(f"changed: {name} drifts too")
alone = after(10, "yuv420p", rounded).mean()
print(f"10 trips, ACCURATE_RND alone: mean {alone:.1f}")
if not alone < after(10, "yuv420p").mean():
    sys.exit("changed: ACCURATE_RND alone helps")
PY

for version in 17.0.0 18.1.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "av==$version" "numpy==2.2.6"
    echo "PyAV $version"
    "$folder/$version/bin/python" "$folder/trips.py"
done
echo "as described"
