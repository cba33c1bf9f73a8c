"""Chromium without a window, driven over a pipe by its DevTools protocol."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMIT_S = 60.0


class Browser:
    """One page, and every event that it caused."""

    def __init__(self, profile: Path) -> None:
        """Start the browser; it reads commands from descriptor 3 and answers on descriptor 4."""
        assert PROGRAM is not None
        commands, self.to_browser = os.pipe()
        self.from_browser, answers = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        flags.append(f"--user-data-dir={profile}")
        self.process = subprocess.Popen(
            # A shell puts the ends of the pipes where Chromium looks for them.
            ["/bin/bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", PROGRAM, *flags],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.answers = os.fdopen(self.from_browser, "rb")
        self.events: list[dict[str, Any]] = []
        self.number = 0
        self.context: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.context = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        content = b""
        while not content.endswith(b"\0"):
            byte = self.answers.read(1)
            assert byte, "the browser is gone"
            content += byte
        message: dict[str, Any] = json.loads(content[:-1])
        return message

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a command and return its result; events on the way are kept."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.context:
            message["sessionId"] = self.context
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, url: str, width: int, height: int) -> None:
        """Load a page as a screen of that size shows it, and wait until it is there."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.ask("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """Return what JavaScript says, as plain values."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"]["value"]

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        import base64

        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait(LIMIT_S)
        os.close(self.to_browser)
        self.answers.close()
