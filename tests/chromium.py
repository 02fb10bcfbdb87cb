"""Drive Debian's Chromium over the DevTools pipe: no driver package, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One headless Chromium with one page; every request, console message, dialog and exception is kept."""

    def __init__(self, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4; the shell puts them there.
        command = (
            f"exec {BINARY} --headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run "
            f"--disable-background-networking --disable-component-update --disable-sync --user-data-dir='{profile}' "
            f"--hide-scrollbars --force-color-profile=srgb --disable-dev-shm-usage about:blank "
            f"3<&{to_read} 4>&{to_write} 2>/dev/null"
        )
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(to_read, to_write))
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._id = b"", 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        self._events: list[str] = []
        target = self.call("Target.createTarget", {"url": "about:blank"}, session=False)["targetId"]
        self._session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=False)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        os.close(self._read)
        os.close(self._write)

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium did not answer in time")
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise RuntimeError("Chromium ended")
            self._buffer += chunk
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(raw)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str([a.get("value", a.get("description")) for a in params["args"]]))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])

    def call(
        self, method: str, params: dict[str, Any] | None = None, *, session: bool = True, seconds: float = 60
    ) -> dict[str, Any]:
        """Send one DevTools command and wait for its answer."""
        self._id += 1
        command: dict[str, Any] = {"id": self._id, "method": method, "params": params or {}}
        if session:
            command["sessionId"] = self._session
        data, sent = json.dumps(command).encode() + b"\0", 0
        while sent < len(data):
            sent += os.write(self._write, data[sent:])
        until = time.monotonic() + seconds
        while True:
            message = self._message(until)
            if message.get("id") == self._id:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> float:
        """Open a page in a window of that size; returns the seconds until its load event."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self.call(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        self._events.clear()
        start = time.monotonic()
        self.call("Page.navigate", {"url": url})
        while "Page.loadEventFired" not in self._events:
            self._message(time.monotonic() + 60)
        return time.monotonic() - start

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript in the page and return its value."""
        result = self.call(
            "Runtime.evaluate",
            {"expression": expression, "returnByValue": True, "awaitPromise": True, "userGesture": True},
        )
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def settle(self) -> None:
        """Wait until two frames were drawn and timers of 100 ms have run."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(() => done(1)))"
        self.run(f"new Promise(done => setTimeout(() => {frames}, 120))")

    def press(self, key: str) -> None:
        """Press a key."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37}
        base = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        self.call("Input.dispatchKeyEvent", {"type": "keyDown", "text": "\r" if key == "Enter" else "", **base})
        self.call("Input.dispatchKeyEvent", {"type": "keyUp", **base})

    def screenshot(self, path: Path, *, full: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        params: dict[str, Any] = {"format": "png", "captureBeyondViewport": full}
        if full:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            params["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 9000), "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", params)["data"]))
