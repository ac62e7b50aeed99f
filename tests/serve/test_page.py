"""The page in a real browser, on the real server with the toy model: what is on the screen is the video."""

from __future__ import annotations

import io
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import wan_files
from browser import Page
from live_page import (
    BLOCK,
    BLOCK_SHOWN,
    BLUE,
    FPS,
    FRAME_SHOWN,
    RED,
    SIZE,
    enabled,
    firsts,
    go,
    live_session,
    made,
    pause_at,
    promised,
    start,
)  # fmt: skip
from serving import serving

from hiar_model import load_video_model
from hiar_model.io.video import upscale
from hiar_model.serve import dormant
from hiar_model.serve.app import Service, Settings
from hiar_model.serve.live import LiveVideo
from hiar_model.toy.oracle import ToyOracle
from hiar_model.toy.prompt import COLOURS

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(load_video_model("toy", "cpu"), tmp_path_factory.mktemp("data")) as service:
        yield service


def test_the_prompted_colour_moves_the_prompted_way(page, service):
    """H.264 through MediaSource: the oracle reads it, and it is the video that the pipeline makes."""
    start(page, service)
    assert not page.evaluate("document.querySelector('#video').hidden")
    pause_at(page, 9)
    shown = firsts(page, range(9))
    error = np.abs(shown.astype(int) - upscale(made(service, 9))).mean((1, 2, 3))
    assert error.max() < 4, error  # of 255: H.264 with colours at half the size
    reading = ToyOracle().evaluate(torch.from_numpy(shown[1:]), RED)
    assert (reading.colour == COLOURS.index("red")).all()
    steps = (reading.centres.diff(dim=0) + SIZE / 2) % SIZE - SIZE / 2
    assert (steps[:, 0] > 1).all() and (steps[:, 1].abs() < 1).all(), steps  # x grows to the right; 3.3 pixels a block
    figures = page.text("#figures")
    assert re.search(r"Made\s*[\d.]+ fps", figures) and re.search(r"P99\s*[\d.]+ m?s", figures), figures
    assert (
        "on the screen" in page.text("#grid-text")
        and page.evaluate("document.querySelectorAll('#grid rect').length") > 80
    )


def test_a_new_prompt_shows_at_the_promised_block_and_a_fork_goes_back(page, service):
    """WebP keeps the toy's frames exactly, so they are those of the pipeline, bit for bit."""
    start(page, service, options="?format=webp")
    page.until(f"{BLOCK_SHOWN} >= 2")
    page.write("#prompt", BLUE)
    page.click("#change")
    block = promised(page)
    pause_at(page, block + 2)
    assert "Now showing" in page.text("#status")
    shown, expected = firsts(page, range(block + 2)), made(service, block + 2, (block, BLUE))
    assert np.array_equal(shown, expected)
    assert np.array_equal(shown[:block], made(service, block + 2)[:block])
    assert not np.array_equal(shown[block], made(service, block + 2)[block])
    assert page.evaluate("document.querySelector('#now').textContent").startswith(BLUE)

    fork, green = block - 2, "a green triangle moving down"
    go(page, fork)
    assert page.evaluate("document.querySelector('#now').textContent").startswith(RED)
    page.write("#prompt", green)
    page.click("#fork")
    page.until("document.querySelector('#status').textContent.includes('Going on from block')")
    page.click("#play")
    pause_at(page, fork + 4)
    shown = firsts(page, range(fork + 4))
    assert np.array_equal(shown, made(service, fork + 4, (fork, green)))
    assert not np.array_equal(shown[fork], expected[fork])


def test_pause_rewind_and_the_keyboard(page, service):
    start(page, service)
    pause_at(page, 4)
    session = live_session(service)
    block = page.evaluate(BLOCK_SHOWN)
    page.until("document.querySelector('#video').paused")
    assert not session.playing and page.evaluate(BLOCK_SHOWN) == block
    page.evaluate("document.querySelector('#stage').focus()")
    page.press("Home")
    page.until(f"{FRAME_SHOWN} === 0")
    page.press("ArrowRight")
    page.press("ArrowRight")
    page.until(f"{FRAME_SHOWN} === {2 * BLOCK}")
    page.press("ArrowLeft")
    page.until(f"{FRAME_SHOWN} === {BLOCK}")
    page.press(" ", "Space", " ")
    page.until(f"{BLOCK_SHOWN} > {block + 2} && !document.querySelector('#video').paused")
    assert session.playing


def require_no_gap(page: Page, service: Service, block: int) -> None:
    """Play up to a block: all before it are there, and right."""
    pause_at(page, block)
    held = page.evaluate("(b => Array.from({length: b.length}, (_, i) => [b.start(i), b.end(i)]))(video.buffered)")
    assert len(held) == 1 and held[0][0] == 0 and held[0][1] >= block * BLOCK / FPS
    error = np.abs(firsts(page, range(block - 1)).astype(int) - upscale(made(service, block - 1))).mean((1, 2, 3))
    assert error.max() < 4, error


def test_the_page_goes_on_when_the_server_was_started_again(chromium, service, tmp_path, monkeypatch):
    """At first with wrong weights, which the page says, and tries again."""
    settings = Settings(state_bytes=10**9)
    page = chromium.page()
    with serving(service.model, tmp_path, settings) as first:
        start(page, first)
        page.until(f"{BLOCK_SHOWN} >= 2")
        (session,) = first.scheduler.sessions
    port = int(first.url.rpartition(":")[2])
    page.until("document.querySelector('#link').textContent === 'reconnecting'")
    assert enabled(page, "change", "fork", "save", "stop") == {"stop"}
    monkeypatch.setattr(dormant, "RETRY_AFTER", 1)
    with serving(replace(service.model, weights_sha256="0" * 64), tmp_path, settings, port=port):
        page.until("document.querySelector('#problem').textContent.includes('it was made with other weights')")
        page.until("document.querySelector('#link').textContent === 'reconnecting'")
    with serving(service.model, tmp_path, settings, port=port) as second:
        page.until("document.querySelector('#status').textContent === 'Connected again.'")
        assert list(second.scheduler.sessions) == [session]
        require_no_gap(page, service, page.evaluate(BLOCK_SHOWN) + 6)
        assert page.text("#link") == "live"
        page.click("#stop")
        page.close()


def test_a_lost_connection_loses_no_frame(page, service):
    """The server closes the socket; then the page is loaded again. Both go on with the same session."""
    start(page, service)
    page.until(f"{BLOCK_SHOWN} >= 2")
    session = live_session(service)
    session.connection.close(1012, "gone")
    page.until("document.querySelector('#status').textContent === 'Connected again.'")
    block = page.evaluate(BLOCK_SHOWN)
    require_no_gap(page, service, block + 6)
    assert [s.id for s in service.scheduler.sessions.values() if not s.gone] == [session.id]

    page.open(f"{service.url}/?again")
    page.until(f"{BLOCK_SHOWN} > {block}")
    assert [s.id for s in service.scheduler.sessions.values() if not s.gone] == [session.id]
    assert page.text("#link") == "live"


def test_the_first_frames_can_be_saved_at_once(page, service):
    """Whenever the next message comes: a block of a large model takes seconds."""
    page.open(f"{service.url}/")
    page.until("!document.querySelector('#words').hidden")
    page.evaluate("""(() => {
      const Real = WebSocket;
      window.WebSocket = class extends Real {
        set onmessage(hear) {
          super.onmessage = (event) => {
            hear(event);
            if (typeof event.data !== "string") super.onmessage = null;
          };
        }
      };
    })()""")
    page.click("#start")
    page.until(f"{BLOCK_SHOWN} >= 0")
    assert enabled(page, "change", "fork", "save", "stop", "play") == {"change", "fork", "save", "stop", "play"}


def test_what_is_typed_before_the_server_answers_stays(chromium, service):
    page = chromium.page()
    wait = "await new Promise((go) => { window.go = go; })"
    script = f"const get = fetch; window.fetch = async (url) => {{ {wait}; return get(url); }}"
    page.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    page.open(f"{service.url}/")
    page.until("window.go !== undefined")
    page.write("#prompt", BLUE)
    page.evaluate("window.go()")
    page.until("!document.querySelector('#words').hidden")
    assert page.evaluate("document.querySelector('#prompt').value") == BLUE
    assert page.evaluate("document.querySelector('#word-shape').value") == "square"
    page.close()


def test_another_tab_takes_the_session_and_this_one_lets_it_go(page, service, chromium):
    start(page, service)
    session = live_session(service)
    other = chromium.page()
    other.open(f"{service.url}/style.css")  # of the same origin, to leave it the token
    other.evaluate(f"sessionStorage.setItem('hiar', {json.dumps(session.token)})")
    other.open(f"{service.url}/")
    other.until(f"{BLOCK_SHOWN} >= 1")
    page.until("document.querySelector('#problem').textContent.includes('another connection')")
    assert page.text("#link") == "not connected" and page.text("#start") == "Start"
    other.click("#stop")
    other.close()


def test_what_is_saved_is_the_video_with_its_record(page, service):
    start(page, service, frames="18")
    page.until("document.querySelector('#status').textContent.includes('complete: 18 frames')")
    page.until(f"{FRAME_SHOWN} === 17")  # the last one is shown
    page.until("document.querySelector('#play').textContent === 'Play'")
    page.click("#play")  # from its start
    page.until(f"{FRAME_SHOWN} < 9 && document.querySelector('#play').textContent === 'Pause'")
    page.click("#save")
    page.until("document.querySelectorAll('#saves a').length === 2")
    video, record = page.evaluate("Array.from(document.querySelectorAll('#saves a'), (a) => a.href)")
    with urllib.request.urlopen(video) as answer, av.open(io.BytesIO(answer.read())) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(frames) == 18
    assert np.abs(np.stack(frames[::BLOCK]).astype(int) - upscale(made(service, 6))).mean((1, 2, 3)).max() < 4
    with urllib.request.urlopen(record) as answer:
        about = json.load(answer)
    assert about["prompt"] == RED and about["frames"] == 18


def test_without_media_source_there_are_pictures(page, service):
    page.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.MediaSource")
    start(page, service)
    assert page.evaluate("document.querySelector('#video').hidden && !document.querySelector('#canvas').hidden")


def test_a_server_with_a_token_takes_it_from_the_address(chromium, service, tmp_path):
    token = "a-token-of-the-test"
    with serving(service.model, tmp_path, Settings(tokens=(token.encode(),))) as guarded:
        page = chromium.page()
        page.open(f"{guarded.url}/")
        page.until("!document.querySelector('#words').hidden")  # it moves the button
        page.write("#prompt", RED)
        page.click("#start")
        page.until("document.querySelector('#problem').textContent.includes('wants a token')")
        page.close()
        page = chromium.page()
        start(page, guarded, options=f"?token={token}", frames="3")
        page.click("#save")
        page.until("document.querySelectorAll('#saves a').length === 2")
        for link in page.evaluate("Array.from(document.querySelectorAll('#saves a'), (a) => a.href)"):
            with urllib.request.urlopen(link) as answer:
                assert answer.status == 200
        assert not page.errors
        page.close()


def test_a_prompt_that_the_model_cannot_show_is_refused_in_words(page, service):
    page.open(service.url)
    page.until("!document.querySelector('#words').hidden")
    page.write("#prompt", "a pink elephant")
    page.click("#start")
    page.until("document.querySelector('#problem').textContent.includes('pink')")
    assert "red, green, blue" in page.text("#problem")
    assert page.evaluate("document.querySelector('#problem').role") == "alert"
    page.write("#prompt", RED)
    page.click("#start")
    page.until(f"{BLOCK_SHOWN} >= 0")
    assert page.text("#problem") == ""
    page.write("#prompt", "nonsense")
    page.click("#change")  # the video goes on
    page.until("document.querySelector('#problem').textContent.includes('nonsense')")
    assert page.text("#status") == ""
    block = page.evaluate(BLOCK_SHOWN)
    page.until(f"{BLOCK_SHOWN} > {block}")


def test_a_server_that_does_not_keep_up_says_so(page, service, monkeypatch):
    make = LiveVideo.make
    monkeypatch.setattr(LiveVideo, "make", lambda video: time.sleep(0.7) or make(video))  # 4 frames a second, not 12
    page.open(service.url)
    page.until("document.querySelector('#prompt').value !== ''")
    page.click("#start")
    page.until("document.querySelector('#grid-text').textContent.startsWith('No block on the screen')")
    page.until(f"{BLOCK_SHOWN} >= 0")
    pace = r"makes [1-5]\.\d frames a second here and the video has 12"
    page.until(f"/{pace}/.test(document.querySelector('#pace').textContent)")
    page.write("#prompt", BLUE)
    page.click("#change")
    block, first = promised(page), page.evaluate(BLOCK_SHOWN)
    assert block > first


def test_a_wan_model_offers_sizes_and_lengths(chromium, tmp_path):
    model = load_video_model(wan_files.write_original(tmp_path / "wan"), "cpu").sized(16, 32)
    with serving(model, tmp_path / "data") as service:
        page = chromium.page()
        page.open(service.url)
        page.until("!document.querySelector('#size-label').hidden")
        sizes = page.evaluate("Array.from(document.querySelectorAll('#size option'), (o) => o.textContent)")
        assert sizes == ["32 × 16", "832 × 480", "480 × 832", "1280 × 720", "720 × 1280"]
        assert page.evaluate("document.querySelector('#words').hidden")
        page.write("#frames", "20")
        assert not page.evaluate("document.querySelector('#form').checkValidity()")
        page.write("#frames", "21")
        page.write("#prompt", wan_files.PROMPT)
        page.click("#start")
        page.until("document.querySelector('#status').textContent.includes('complete: 21 frames')")
        assert page.text("#problem") == "" and not page.errors
        page.click("#stop")
        page.close()


def test_every_control_has_a_name_and_the_words_make_the_prompt(page, service):
    start(page, service)
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "combobox", "slider", "spinbutton", "image", "img", "Video", "status", "link"}
    nodes = [n for n in tree if not n.get("ignored") and n.get("role", {}).get("value") in roles]
    names = {n["role"]["value"]: [] for n in nodes}
    for node in nodes:
        names[node["role"]["value"]].append(node.get("name", {}).get("value", ""))
    assert all(all(named) for role, named in names.items() if role != "status"), names
    assert len(names["button"]) >= 8 and len(names["combobox"]) >= 6
    page.evaluate(
        "for (const [name, value] of [['colour', 'orange'], ['shape', 'plus'], ['direction', 'up and left'],"
        "['size', 'large'], ['speed', 'slowly']]) { const e = document.querySelector('#word-' + name); e.value = value;"
        "e.dispatchEvent(new Event('change')); }"
    )
    assert page.evaluate("document.querySelector('#prompt').value") == "a large orange plus moving up and left slowly"
    page.write("#prompt", "an orange circle moving down and right")
    values = page.evaluate("Array.from(document.querySelectorAll('#words select'), (e) => e.value)")
    assert values == ["medium", "orange", "circle", "down and right", "medium"]


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_sticks_out(page, service, width, tmp_path):
    """At the width of a phone there is one column, no scrolling sideways, and buttons that a finger hits."""
    page.resize(width, 800, mobile=width < 1000)
    start(page, service)
    page.until(f"{BLOCK_SHOWN} >= 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    heights = page.evaluate("Array.from(document.querySelectorAll('button'), (b) => b.getBoundingClientRect().height)")
    assert min(heights) >= 40
    first, second = page.evaluate(
        "Array.from(document.querySelectorAll('section'), (s) => s.getBoundingClientRect().x)"
    )[:2]
    assert (first == second) == (width < 1000)
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10000


def test_beneath_a_path_of_a_proxy(page: Page, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is asked for beneath the path that the page has."""
    inner, paths = service.app.app, set()

    async def beneath(scope, receive, send):
        paths.add(scope["path"])
        await inner({**scope, "path": scope["path"].removeprefix("/hiar")}, receive, send)

    monkeypatch.setattr(service.app, "app", beneath)
    start(page, service, options="hiar/")
    page.click("#save")
    page.until("document.querySelector('#saves a') !== null")
    address = page.evaluate("document.querySelector('#saves a').href")
    assert address.startswith(f"{service.url}/hiar/v1/videos/") and address.endswith("/content")  # type: ignore[attr-defined]
    assert {"/hiar/v1/info", "/hiar/v1/realtime/video"} <= paths and all(path.startswith("/hiar/") for path in paths)
