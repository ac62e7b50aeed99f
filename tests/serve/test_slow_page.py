"""The page where a block takes its time, and where the network loses what is said."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from browser import Page
from live_page import (
    BLOCK,
    BLOCK_SHOWN,
    BLUE,
    FRAME_SHOWN,
    enabled,
    live_session,
    pause_at,
    promised,
    says,
    start,
)  # fmt: skip
from serving import serving, until

from hiar_model import load_video_model
from hiar_model.serve.app import Service
from hiar_model.serve.live import LiveVideo

pytestmark = pytest.mark.browser

SAVED = "document.querySelectorAll('#saves a').length === 2"
GRID = r"/^Block (\d+) on .* begins at block (\d+)/.exec(document.querySelector('#grid-text').textContent)?.slice(1)"
LOSE = """((...types) => {
  const send = WebSocket.prototype.send, lost = window.unsent = new Set(types);
  WebSocket.prototype.send = function (text) { if (!lost.delete(JSON.parse(text).type)) send.call(this, text); };
})"""
PACE = """import('./pace.js').then(({Pace}) => {
  let now = 0;
  const clock = performance.now;
  performance.now = () => now;
  const pace = new Pace(), seen = [pace.until(1, true)], first = {p50: null, first_chunk_s: 5};
  now = 6000; pace.chunk(first, false);
  seen.push(pace.until(2, true)); now = 8000; seen.push(pace.until(2, true), pace.until(2, false), pace.words(3, 12));
  now = 9000; pace.chunk({...first, p50: 4}, true);
  seen.push(pace.until(1, true)); now = 20000; seen.push(pace.until(1, true), pace.until(3, true), pace.words(3, 12));
  for (const p50 of [0.1, 0.1]) { pace.chunk({...first, p50}, true); now += 3000; seen.push(pace.until(2, true)); }
  pace.chunk({...first, p50: 0.1}, true); seen.push(pace.words(3, 12));
  performance.now = clock;
  return seen;
})"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(load_video_model("toy", "cpu"), tmp_path_factory.mktemp("data")) as service:
        yield service


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Each is made when the test releases it."""
    blocks, make = threading.Semaphore(0), LiveVideo.make
    monkeypatch.setattr(LiveVideo, "make", lambda video: blocks.acquire() and make(video))
    yield blocks
    blocks.release(1000)


def test_what_is_asked_of_a_slow_model_is_heard_at_once(
    page: Page, service: Service, blocks: threading.Semaphore
) -> None:
    """While a block is made nothing is answered, and what was asked for is not lost."""
    page.open(f"{service.url}/")  # type: ignore[attr-defined]
    page.until("!document.querySelector('#words').hidden")
    page.click("#start")
    says(page, "#hint", "The first block is being made.")
    assert enabled(page, "play", "stop", "change", "fork", "save") == {"play", "stop", "change"}
    assert page.text("#status").startswith("Started: ")
    blocks.release()
    page.until(f"{BLOCK_SHOWN} === 0")
    session = live_session(service)

    page.write("#prompt", BLUE)
    page.press("Enter", "Enter", "\r")  # changes the prompt, and does not end the video
    says(page, "#status", f"Asked for “{BLUE}”, once the block in hand is made.")
    blocks.release()
    assert promised(page) == 2 and live_session(service) is session
    page.until("/^Block 2 (is due|shows in [.\\d]+ s)\\.$/.test(document.querySelector('#countdown').textContent)")
    page.click("#play")
    page.until("/^Block 2 shows [.\\d]+ s after Play\\.$/.test(document.querySelector('#countdown').textContent)")
    page.click("#play")

    page.click("#save")
    page.click("#stop")
    says(page, "#status", "The video is being saved, then it is stopped.")
    blocks.release()
    page.until(SAVED)
    says(page, "#status", "Stopped.")
    assert session.gone and page.text("#link") == "not connected" and page.text("#countdown") == ""


def test_the_seconds_until_a_block_shows(page: Page, service: Service) -> None:
    """A clock that is set by hand: the block in hand counts from when it was begun; a slow network counts too."""
    page.open(f"{service.url}/")  # type: ignore[attr-defined]
    unknown, *seen = page.evaluate(PACE)
    waits = "frames a second here and the video has 12: the picture waits for each block."
    expected = [10, 8, 10, "", 4, 0, 8, f"The server makes 0.75 {waits}", 19, 3, f"The network brings 1.0 {waits}"]
    assert unknown is None and seen == expected


def test_what_the_network_lost_is_asked_again_and_a_page_that_is_loaded_anew_knows_all(
    page: Page, service: Service
) -> None:
    start(page, service)
    pause_at(page, 3)
    session = live_session(service)
    until(lambda: not session.playing and not session.pending)
    page.evaluate(f"{LOSE}('prompt', 'save')")
    page.write("#prompt", BLUE)
    page.click("#change")
    page.click("#save")
    assert session.connection is not None
    session.connection.close(1012, "gone")
    page.until(SAVED)
    shown, coming = map(int, page.until(GRID))
    assert coming > shown and page.evaluate("document.querySelectorAll('#saves a').length") == 2

    page.open(f"{service.url}/?again")  # type: ignore[attr-defined]
    says(page, "#status", f"“{BLUE}” shows from block {coming}.")
    page.until(f"{FRAME_SHOWN} === {BLOCK * shown}")  # the block that was on the screen, although it was acked
    assert page.text("#play") == "Play" and not session.playing and page.evaluate(SAVED)
    assert page.evaluate("document.querySelector('#prompt').value") == BLUE
    page.click("#back")  # to what the page does not hold: it is made, and shown, and all stays paused
    page.until(f"{FRAME_SHOWN} === {BLOCK * (shown - 1)}")
    until(lambda: not session.playing)
    assert page.text("#play") == "Play"
    page.click("#play")
    says(page, "#status", f"Now showing “{BLUE}”.")
    assert page.evaluate(BLOCK_SHOWN) >= coming


def test_a_network_that_breaks_without_a_word_is_noticed(
    page: Page, service: Service, blocks: threading.Semaphore
) -> None:
    """Nothing comes, the page asks, and nothing answers: it connects anew."""
    blocks.release(2)
    start(page, service)
    pause_at(page, 1)
    session = live_session(service)
    until(lambda: not session.playing)
    connection = session.connection
    page.evaluate(
        f"{LOSE}('pause'); let skipped = 0; const clock = performance.now.bind(performance);"
        "performance.now = () => clock() + skipped; window.skip = (ms) => { skipped += ms; };"
    )
    page.until("skip(11000), unsent.size === 0")  # it asks
    assert page.text("#link") == "live"
    page.evaluate("skip(21000)")
    says(page, "#status", "Connected again.")
    assert live_session(service) is session and session.connection is not connection
    assert page.text("#play") == "Play" and not session.playing


def test_a_start_that_is_refused_leaves_nothing_waiting(page: Page, service: Service) -> None:
    page.open(f"{service.url}/?format=png")  # type: ignore[attr-defined]
    page.until("!document.querySelector('#words').hidden")
    page.click("#start")
    says(page, "#problem", "format must be one of mp4, webp, jpeg")
    assert (page.text("#link"), page.text("#status")) == ("not connected", "") and not enabled(page, "stop", "play")
    says(page, "#hint", "Choose a prompt and start.")
