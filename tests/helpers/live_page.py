"""The page of `hiar serve` in a browser: what a viewer does, and what is on the screen."""

from __future__ import annotations

import base64
import io
import re

import av
import numpy as np
from browser import Page

from hiar_model import PromptSchedule, VideoPipeline
from hiar_model.serve.app import Service
from hiar_model.serve.session import ViewerSession

RED, BLUE = "a red circle moving right", "a blue square moving up fast"
SIZE, BLOCK, FPS = 32, 3, 12  # pixels, frames of a block and a second, of the toy
CAPTURE = """(async () => {
  const element = document.querySelector('#video:not([hidden]), #canvas:not([hidden])');
  while (element.seeking || element.readyState < 2) await new Promise((done) => setTimeout(done, 10));
  const copy = new OffscreenCanvas(element.videoWidth ?? element.width, element.videoHeight ?? element.height);
  copy.getContext('2d').drawImage(element, 0, 0);
  const file = await copy.convertToBlob({type: 'image/png'});
  const bytes = new Uint8Array(await file.arrayBuffer());
  return btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join(''));
})()"""
BLOCK_SHOWN = "Number(/block (\\d+)/.exec(document.querySelector('#position').textContent)?.[1] ?? -1)"
FRAME_SHOWN = "Number(/frame (\\d+)/.exec(document.querySelector('#position').textContent)?.[1] ?? -1)"


def start(page: Page, service: Service, prompt: str = RED, options: str = "", **fields: str) -> None:
    page.open(f"{service.url}/{options}")  # type: ignore[attr-defined]
    page.until("!document.querySelector('#words').hidden")
    for name, value in {"prompt": prompt, **fields}.items():
        page.write(f"#{name}", value)
    page.click("#start")
    page.until(f"{BLOCK_SHOWN} >= 0")


def pause_at(page: Page, block: int) -> None:
    """Let it play up to a block, and pause it."""
    page.until(f"{BLOCK_SHOWN} >= {block}")
    page.click("#play")
    page.until("document.querySelector('#play').textContent === 'Play'")


def go(page: Page, block: int) -> None:
    """To the first frame of a block, by the slider."""
    script = (
        "(() => {{ const e = document.querySelector('#rewind'); e.value = {0}; for (const n of ['input', 'change'])"
    )
    page.evaluate((script + " e.dispatchEvent(new Event(n)); }})()").format(block))
    page.until(f"{FRAME_SHOWN} === {BLOCK * block}")


def capture(page: Page) -> np.ndarray:
    """What is on the screen, uint8 [H, W, 3]."""
    with av.open(io.BytesIO(base64.b64decode(page.evaluate(CAPTURE)))) as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


def firsts(page: Page, blocks: range) -> np.ndarray:
    """The first frames of these blocks, one after the other."""
    images = []
    for block in blocks:
        go(page, block)
        if page.evaluate("!document.querySelector('#canvas').hidden"):
            page.until(f"document.querySelector('#canvas').dataset.frame === '{BLOCK * block}'")
        images.append(capture(page))
    return np.stack(images)


def made(service: Service, blocks: int, *changes: tuple[int, str], prompt: str = RED) -> np.ndarray:
    """The first frame of each block of the same video made at once; changes: (block, prompt)."""
    lines = [(0, prompt), *((BLOCK * block / FPS, text) for block, text in changes)]
    video = VideoPipeline(service.model)(
        None, prompts=PromptSchedule.of(lines), num_frames=BLOCK * blocks, order="stream"
    )
    return video.frames[::BLOCK]


def enabled(page: Page, *names: str) -> set[str]:
    """Which of these buttons can be pressed."""
    return {name for name in names if not page.evaluate(f"document.querySelector('#{name}').disabled")}


def promised(page: Page) -> int:
    """The block of which the page says that a new prompt shows from it on."""
    page.until("document.querySelector('#status').textContent.includes('shows from block')")
    match = re.search(r"shows from block (\d+)\.", page.text("#status"))
    assert match, page.text("#status")
    return int(match[1])


def live_session(service: Service) -> ViewerSession:
    """The one that has not ended."""
    (session,) = (one for one in list(service.scheduler.sessions.values()) if not one.gone)
    return session


def says(page: Page, selector: str, text: str) -> None:
    """Wait until an element says this, among other words."""
    page.until(f"document.querySelector({selector!r}).textContent.includes({text!r})")
