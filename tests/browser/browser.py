"""Headless Chromium, controlled by the DevTools protocol over a pipe."""

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

NODE_MODULES = REPO / ".node/node_modules"  # make test-browser installs it
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMIT_S = 60.0
PROBLEMS = """({passes, violations}) => [passes.length, violations.flatMap(
  ({id, nodes}) => nodes.map(node => `${id}: ${node.html}: ${node.failureSummary}`))]"""


@contextmanager
def open_browser(profile: Path) -> Iterator["Browser"]:
    """Yield a browser. Skip the test without Chromium, or fail with DISTLENET_BROWSER=required (make test-browser)."""
    if PROGRAM is None:
        if os.environ.get("DISTLENET_BROWSER") == "required":
            pytest.fail("no Chromium")
        pytest.skip("no Chromium: apt-get install chromium")
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@contextmanager
def static_host_of(directory: Path) -> Iterator[str]:
    """Serve the files of a directory; yield the address, without a slash at its end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=directory)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Browser:
    """One page and its events."""

    def __init__(self, profile: Path) -> None:
        """Start the browser, which reads commands from descriptor 3 and writes responses to descriptor 4."""
        assert PROGRAM is not None
        commands, self.to_browser = os.pipe()
        self.from_browser, responses = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        flags.append(f"--user-data-dir={profile}")
        self.process = subprocess.Popen(
            # A shell moves the ends of the pipes to the descriptors that Chromium uses.
            ["/bin/bash", "-c", f'exec "$@" 3<&{commands} 4>&{responses}', "bash", PROGRAM, *flags],
            pass_fds=(commands, responses),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(responses)
        self.responses = os.fdopen(self.from_browser, "rb")
        self.events: list[dict[str, Any]] = []
        self.last_id = 0
        self.context: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.context = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        content = b""
        while not content.endswith(b"\0"):
            byte = self.responses.read(1)
            assert byte, "the browser has exited"
            content += byte
        message: dict[str, Any] = json.loads(content[:-1])
        return message

    def send(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a command and return its result; keep the events that arrive before it."""
        self.last_id += 1
        message: dict[str, Any] = {"id": self.last_id, "method": method, "params": parameters}
        if self.context:
            message["sessionId"] = self.context
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self.last_id:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def open(self, url: str, width: int, height: int) -> None:
        """Load a page for a screen of that size, and wait for its load event."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript and return the result as plain values."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")  # undefined has none

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def prefer(self, scheme: str) -> None:
        """Prefer a color scheme, light or dark, as a user's system does."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def accessibility_problems(self, without: tuple[str, ...] = ()) -> list[str]:
        """Return what axe-core finds wrong with the page for users of a keyboard, a screen reader or low vision.

        ``without`` has the rules that are not checked.
        """
        self.evaluate((NODE_MODULES / "axe-core/axe.min.js").read_text() + "; undefined")
        options = json.dumps({"rules": {rule: {"enabled": False} for rule in without}})
        checked, problems = self.evaluate(f"axe.run({options}).then({PROBLEMS})")
        assert checked, "axe-core has checked nothing"
        return list(problems)

    def close(self) -> None:
        """Kill the browser."""
        self.process.kill()
        self.process.wait(LIMIT_S)
        os.close(self.to_browser)
        self.responses.close()
