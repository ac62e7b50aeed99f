"""Makes the looping picture of the README from a video.

    hiar compare "a red circle moving right" --model scenes -o out/compare.mp4
    python docs/loop.py out/compare.mp4 docs/pictures/compare.webp

An animated WebP that is as sharp as it can be below ``--most`` bytes; the last frame stays for a second.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

QUALITIES = (90, 80, 70, 60, 50, 40, 30)
LAST = 1000  # milliseconds that the last frame stays


def loop(video: Path, most: int) -> bytes:
    """The frames of a video as an animated WebP of at most ``most`` bytes.

    Raises:
        ValueError: it is larger even at the lowest quality.
    """
    import av
    from PIL import Image

    from hiar_model.io.encoders import decoded_rgb

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 12)
        frames = [Image.fromarray(decoded_rgb(frame)) for frame in container.decode(stream)]
    durations = [round(1000 / rate)] * (len(frames) - 1) + [LAST]
    for quality in QUALITIES:
        file = io.BytesIO()
        frames[0].save(
            file, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=quality, method=6
        )
        if file.tell() <= most:
            return file.getvalue()
    raise ValueError(f"{video} takes {file.tell()} bytes as WebP at quality {quality}, more than {most}: shorten it")


def main() -> None:
    from hiar_model.io.atomic import atomic_write

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--most", type=int, default=2_000_000, help="bytes")
    a = parser.parse_args()
    picture = loop(a.video, a.most)
    atomic_write(a.picture, picture)
    print(f"{a.picture}: {len(picture)} bytes")


if __name__ == "__main__":
    main()
