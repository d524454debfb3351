"""A headless Chromium driven over its own DevTools protocol: no driver package in between."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page."""

    def __init__(self, folder: Path, url: str, *, dark: bool = False, width: int = 1100, height: int = 800) -> None:
        assert CHROMIUM, "no Chromium on this machine"
        self._log = (folder / "chromium.log").open("wb")
        home = folder / "home"
        home.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
                "--disable-dev-shm-usage",
                f"--user-data-dir={folder / 'profile'}",
                f"--window-size={width},{height}",
                "--remote-debugging-port=0",
                "about:blank",
            ],
            stdout=self._log,
            stderr=self._log,
            env=os.environ | {"HOME": str(home)},
        )
        self._open = contextlib.ExitStack()
        self._ids = itertools.count(1)
        self.exceptions: list[Any] = []
        try:
            self._connect(folder / "profile" / "DevToolsActivePort")
            self.call("Runtime.enable")
            self.call("Page.enable")
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            self.call("Emulation.setEmulatedMedia", features=scheme)
            self.call("Page.navigate", url=url)
            self.wait('location.href !== "about:blank" && document.readyState === "complete"')
        except BaseException:
            self.close()
            raise

    def _connect(self, port_file: Path) -> None:
        import urllib.request

        from websockets.sync.client import connect

        deadline = time.monotonic() + 30
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert self.process.poll() is None, "chromium ended"
            assert time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as response:
            page = next(target for target in json.load(response) if target["type"] == "page")
        self._socket = self._open.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("method") == "Runtime.exceptionThrown":
                self.exceptions.append(message["params"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, (
                f"never true: {condition}; page says: {self.run('document.body.innerText')}"
            )
            time.sleep(0.05)

    def key(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key, as a person would."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        self._open.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()
