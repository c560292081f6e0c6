"""The status page in a headless Chromium, driven over its debugging pipe: what a person sees, wide and on a phone.

Skipped without chromium. FASTTUN_SCREENSHOTS=DIR keeps the pictures. Not for: the HTTP server (test_observe.py).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.tunnels import Pipe, bind_udp, ip_packet

from fasttun import Forwarder
from fasttun.observe import Observers

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_S = 20.0

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")


class Browser:
    """One page of a Chromium, by the DevTools protocol: messages of JSON, each ended by a NUL, on descriptors 3, 4."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        self._process = subprocess.Popen(
            ["bash", "-c", 'exec "$0" "$@" 3<&"$IN" 4>&"$OUT"', CHROMIUM, "--headless=new", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "about:blank"],
            env={**os.environ, "IN": str(to_read), "OUT": str(to_write)}, pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._number = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []

    def attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Its result; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._from], [], [], PATIENCE_S)[0], "chromium does not answer"
            part = os.read(self._from, 1 << 20)
            assert part, "chromium has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def evaluate(self, expression: str) -> Any:
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, expression: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not self.evaluate(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.1)

    def show(self, address: str, width: int, height: int, scheme: str) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=address)

    def picture(self, name: str) -> None:
        directory = os.environ.get("FASTTUN_SCREENSHOTS")
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        assert png.startswith(b"\x89PNG")
        if directory:
            Path(directory, f"{name}.png").write_bytes(png)

    def complaints(self) -> list[Any]:
        """What the page's console has of errors, breaches of its policy among them."""
        return [event for event in self.events if event["method"] == "Runtime.exceptionThrown" or (
            event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")]

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self._session = {}
            self.call("Browser.close")
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    with contextlib.closing(browser):
        browser.attach()
        yield browser


@dataclass
class Served:
    url: str
    endpoint: str
    end: Callable[[], None]


@pytest.fixture
def served() -> Iterator[Served]:
    """A listener on a socketpair, with a peer that sends all the time, and what is no packet now and then."""
    stop = threading.Event()
    with Pipe.make() as pipe, bind_udp() as sock, bind_udp() as peer, \
            Forwarder(listen=True, udp_fd=sock.fileno(), tun_fd=pipe.fd) as tunnel, \
            Observers(tunnel, metrics="127.0.0.1:0") as observers:
        assert observers._web is not None
        to = sock.getsockname()

        def traffic() -> None:
            while not stop.wait(0.01):
                peer.sendto(ip_packet("10.7.0.2", "10.7.0.1", b"x" * 800), to)
                peer.sendto(b"junk", to)
                with contextlib.suppress(OSError):
                    pipe.receive(0.2)
                    pipe.send(ip_packet("10.7.0.1", "10.7.0.2", b"y" * 200))

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            yield Served(f"http://{observers._web.address}/", f"127.0.0.1:{peer.getsockname()[1]}", observers.close)
        finally:
            stop.set()
            thread.join()


FILLED = ("document.querySelectorAll('#peers td').length > 0"
          " && document.getElementById('in').points.length > 2 && document.getElementById('out').points.length > 2")


@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (1000, "dark"), (390, "light"), (320, "dark")])
def test_the_page_shows_the_tunnel(browser: Browser, served: Served, width: int, scheme: str) -> None:
    browser.show(served.url, width, 1000, scheme)
    browser.wait(FILLED)
    text = browser.evaluate("document.body.innerText")
    assert "plain: not encrypted" in text
    assert served.endpoint in text
    assert "10.7.0.2" in text
    assert re.search(r"inbound malformed: \d+", text)
    assert "tun: off: a descriptor is used as it is" in text
    assert re.search(r"\d kbit/s", text)
    heights = "[...document.getElementById('{}').points].map((point) => point.y)"
    assert min(browser.evaluate(heights.format("in"))) < 10 < max(browser.evaluate(heights.format("out")))

    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    beyond = ("[...document.querySelectorAll('body *')].filter((one) => getComputedStyle(one).display !== 'none'"
              " && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML)")
    assert browser.evaluate(beyond) == []
    colours = browser.evaluate("[getComputedStyle(document.body).backgroundColor, "
                               "getComputedStyle(document.body).color]")
    back, front = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (back < front) == (scheme == "dark")
    assert abs(back - front) > 400
    browser.picture(f"{width}-{scheme}")

    assert browser.complaints() == []
    asked = {event["params"]["request"]["url"] for event in browser.events
             if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(served.url)} <= {"about:blank"}


def test_the_page_says_that_the_tunnel_has_ended(browser: Browser, served: Served) -> None:
    browser.show(served.url, 1000, 800, "light")
    browser.wait(FILLED)
    served.end()
    browser.wait("document.getElementById('what').textContent === 'the tunnel does not answer'")
    assert browser.evaluate("document.getElementById('what').className").split() == ["faint", "bad"]
