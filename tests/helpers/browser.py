"""A headless Chromium, driven over its DevTools protocol. One browser may open several pages, one after the other."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0  # seconds that anything may take on a busy machine
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0", "--mute-audio",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--autoplay-policy=no-user-gesture-required", "--force-color-profile=srgb",
)  # fmt: skip


def find_chromium() -> str | None:
    """Its path, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser with a profile of its own, in ``folder``; close it."""

    def __init__(self, folder: Path) -> None:
        path = find_chromium()
        assert path is not None, f"none of {', '.join(NAMES)} is installed (Debian: apt install chromium)"
        self.log = (folder / "chromium.log").open("wb")
        words = [path, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self.process = subprocess.Popen(words, stdout=self.log, stderr=self.log, start_new_session=True)
        file = folder / "profile" / "DevToolsActivePort"
        wait_until(lambda: file.exists() and len(file.read_text().splitlines()) == 2, "Chromium does not start")
        self.address = f"http://127.0.0.1:{file.read_text().splitlines()[0]}"

    def page(self, **options: Any) -> Page:
        """A new page."""
        request = urllib.request.Request(f"{self.address}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            about = json.load(answer)
        return Page(about["webSocketDebuggerUrl"], **options)

    def close(self) -> None:
        """End it, and all its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


class Page:
    """A page. errors: what it complained about in its console."""

    def __init__(self, address: str, width: int = 1200, height: int = 900, scale: float = 1.0) -> None:
        from websockets.sync.client import connect

        self.ending = ExitStack()
        self.socket = self.ending.enter_context(connect(address, max_size=None))
        self.number, self.errors = 0, list[str]()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height, scale)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=PATIENCE))
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return message["result"]
            self._event(message)

    def _event(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        if message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise AssertionError(result["exceptionDetails"].get("exception", {}).get("description", result))
        return result["result"].get("value")

    def until(self, script: str, seconds: float = PATIENCE) -> Any:
        """Wait until an expression is true; its value."""
        try:
            return wait_until(lambda: self.evaluate(script), script, seconds)
        except AssertionError as error:
            text = self.evaluate("document.body.innerText")
            raise AssertionError(f"never true: {error}; errors: {self.errors}; the page says: {text}") from None

    def open(self, address: str) -> None:
        """Go to an address and wait for its scripts."""
        self.call("Page.navigate", url=address)
        self.until(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")

    def resize(self, width: int, height: int, scale: float = 1.0, mobile: bool = False) -> None:
        """The size of the window, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a mouse does; again where the page moved it away meanwhile."""
        wait_until(lambda: self._click(selector), f"{selector} moves on")

    def _click(self, selector: str) -> bool:
        x, y, enabled = self.evaluate(
            f"(() => {{ const e = {element(selector)}; e.scrollIntoView({{block: 'center'}}); window.hit = false;"
            "e.addEventListener('click', () => { window.hit = true; }, {capture: true, once: true});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2, !e.disabled]; })()"
        )
        assert enabled, f"{selector} is disabled"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        return self.evaluate("window.hit")

    def press(self, key: str, code: str = "", text: str = "") -> None:
        """Press a key where the focus is."""
        code = code or key
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=code, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=code)

    def write(self, selector: str, text: str) -> None:
        """Replace the text of a field, as a person types it."""
        self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.focus(); e.select(); }})()"
        )
        self.call("Input.insertText", text=text)

    def text(self, selector: str) -> str:
        """What an element says."""
        return self.evaluate(f"{element(selector)}.textContent")

    def screenshot(self, file: Path, whole: bool = True) -> None:
        """A PNG of the page."""
        result = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(result["data"]))

    def close(self) -> None:
        """Close the page."""
        self.call("Page.close")
        self.ending.close()


def element(selector: str) -> str:
    """The expression for the first element of a CSS selector."""
    return f"document.querySelector({json.dumps(selector)})"


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that ends with the block."""
    opened = Browser(folder)
    try:
        yield opened
    finally:
        opened.close()


def wait_until(condition: Any, what: str, seconds: float = PATIENCE) -> Any:
    """The first true value of a function; AssertionError if none comes in time."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, what
        time.sleep(0.03)
    return value
