"""A headless Chromium for tests, driven over its own debugging pipe (Chrome DevTools Protocol).

It needs nothing but the browser: selenium would need a driver of the browser's exact version, and playwright brings
Node.js. A browser that is not there, does not start or stops answering skips the tests that need it.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_SECONDS, CALL_SECONDS = 30.0, 60.0
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--force-prefers-reduced-motion", "--hide-scrollbars", "--remote-debugging-pipe"),
)
KEYS = {"Enter": 13, "Home": 36, "End": 35, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, " ": 32}


class Browser:
    """One browser with one tab.

    Attributes:
        errors: what the console and uncaught exceptions said since the last `open`.
        requests: URLs asked for since the last `open`.
    """

    def __init__(self, folder: Path):
        path = next((path for name in NAMES if (path := shutil.which(name))), None)
        if path is None or shutil.which("bash") is None:
            pytest.skip("no Chromium here: apt-get install chromium")
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._buffer, self._last_id, self._session, self._loaded = b"", 0, "", False
        command_read, self._write = os.pipe()
        self._read, answer_write = os.pipe()
        # The browser reads from 3 and writes to 4. Ends with higher numbers cannot be in the way of these two.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (command_read, answer_write)]
        script = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, path, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=ends, start_new_session=True,
        )  # fmt: skip
        for end in (command_read, answer_write, *ends):
            os.close(end)
        targets = self.call("Target.getTargets", timeout=START_SECONDS)["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        if not self.run("CSS.supports('color', 'light-dark(red, blue)')"):
            self._give_up("is older than version 123")

    def call(self, method: str, *, timeout: float = CALL_SECONDS, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result. Events that arrive meanwhile are noted."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        try:
            os.write(self._write, json.dumps(message).encode() + b"\0")
        except OSError:
            self._give_up("has stopped")
        deadline = time.monotonic() + timeout
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._give_up("does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                self._give_up("has stopped")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(value.get("value")) for value in params["args"]))
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Page.loadEventFired":
            self._loaded = True

    def _give_up(self, what: str) -> None:
        self.close()
        pytest.skip(f"Chromium {what}")

    def close(self) -> None:
        """End the browser with all its processes."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()

    def set_view(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """Set the size of the page, and whether the system of its reader is light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, path: Path, *, scripts: bool = True) -> None:
        """Open a file and wait until it has been loaded."""
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.errors.clear()
        self.requests.clear()
        self._loaded = False
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + CALL_SECONDS
        while not self._loaded:
            self._receive(deadline)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression, of which a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + CALL_SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.02)
        return value

    def press(self, *keys: str) -> None:
        """Press keys, by their names in the protocol, in what has the focus."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
            event = {"key": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def save_picture(self, path: Path, *, whole: bool = False) -> None:
        """Save what is in sight, or the whole page, as PNG."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
