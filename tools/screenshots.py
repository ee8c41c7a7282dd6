"""The page of serve.py as a person sees it: a real browser drops a picture, asks, and is photographed.

What it teaches: a browser can be driven without a package. Chromium reads commands from one pipe and
writes events to another, as JSON with a zero byte at the end of each (its DevTools protocol).

    Browser --{"method": "Page.navigate", ...}\\0--> chromium --headless --remote-debugging-pipe
            <--{"id": 3, "result": {...}}\\0--------

    python serve.py                                  # in another terminal
    python -m tools.screenshots --url http://127.0.0.1:8000

writes figures/serve.png (a window, light) and figures/serve-phone.png (a phone, dark).
"""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data import world
from infra.cli import command
from tools.readme import ROOT

SECONDS = 60.0  # for anything that is waited for
# No sandbox: it refuses to run as root, as in a container; only a page of our own is opened.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe --hide-scrollbars"
)
# Becomes a program whose descriptors 3 and 4 are two of ours.
WITH_PIPES = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
# Drops files on the page: what a hand does, as the page's own code sees it.
DROP = """
const files = new DataTransfer();
for (const text of PICTURES) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  files.items.add(new File([bytes], "picture.png", { type: "image/png" }));
}
for (const name of ["dragover", "drop"]) {
  const how = { dataTransfer: files, bubbles: true, cancelable: true };
  document.body.dispatchEvent(new DragEvent(name, how));
}
"""


@dataclass
class ScreenshotOptions:
    """Photograph the page of a server that runs on this machine."""

    url: str = "http://127.0.0.1:8000"
    out: Path = ROOT / "figures"


class Browser:
    """One page in a headless Chromium. A context manager; raises FileNotFoundError where there is none."""

    def __enter__(self) -> "Browser":
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            raise FileNotFoundError("no chromium and no google-chrome on this machine")

        # it reads from its descriptor 3 and writes to 4
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self.commands = os.pipe()
        self.events, own = os.pipe()
        home = f"--user-data-dir={self.folder.name}"
        words = [program, *FLAGS.split(), home, "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITH_PIPES, str(theirs), str(own), *words],
            pass_fds=(theirs, own),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(own)
        self.rest = b""
        self.number = 0
        self.session: dict[str, str] = {}

        # one page, to which all further commands go
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.events)
        self.folder.cleanup()

    def send(self, method: str, **parameters: Any) -> dict:
        """A command, and its result. Raises RuntimeError when it is refused."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            said = self.read_message(until)
            if said.get("id") != self.number:
                continue  # an event
            if "error" in said:
                raise RuntimeError(f"{method}: {said['error']}")
            return said["result"]

    def read_message(self, until: float) -> dict:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.events], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            block = os.read(self.events, 1 << 20)
            if not block:
                raise RuntimeError("the browser has ended")
            self.rest += block
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    # ---------------------------------------------------------------------------- what a person does

    def open(
        self, url: str, width: int, height: int, phone: bool = False, dark: bool = False
    ) -> None:
        """A page in a window of this size."""
        scale = 2 if phone else 1
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)
        self.wait_for("document.readyState == 'complete' && model")

    def run(self, script: str) -> Any:
        """The value of an expression in the page. Raises RuntimeError for an exception there."""
        done = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(f"in the page: {done['exceptionDetails']['exception']}")
        return done["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Until an expression is true. Raises TimeoutError."""
        until = time.monotonic() + SECONDS
        while not self.run(f"Boolean({script})"):
            if time.monotonic() > until:
                raise TimeoutError(f"it did not become true: {script}")
            time.sleep(0.05)

    def drop(self, pictures: list[Image.Image]) -> None:
        """Pictures onto the page; back when they are shown above the question."""
        texts = []
        for picture in pictures:
            file = io.BytesIO()
            picture.save(file, "PNG")
            texts.append(base64.b64encode(file.getvalue()).decode())
        script = DROP.replace("PICTURES", json.dumps(texts))
        self.run(f"(() => {{ {script} }})()")
        self.wait_for(f"document.querySelectorAll('#chosen img').length == {len(pictures)}")

    def ask(self, question: str) -> str:
        """Type, press the button, and read the whole answer."""
        self.run(f"$('text').value = {json.dumps(question)}")
        self.run("$('send').click()")
        self.wait_for("!running && document.querySelector('.turn:last-child .about')")
        return self.run("document.querySelector('.turn:last-child').innerText")

    def photograph(self, path: Path) -> None:
        shot = self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


def chart_of(index: int) -> Image.Image:
    """The bars of a held-out scene of the toy's world."""
    parts = world.sample(index, 0, {"charts": 1.0}, test=True).messages[0].parts
    return next(part for part in parts if isinstance(part, Image.Image))


def take_screenshots(options: ScreenshotOptions) -> None:
    """Both figures: a picture, a question, and a second one with thinking, seen from inside."""
    windows = {
        "serve.png": {"width": 1000, "height": 860},
        "serve-phone.png": {"width": 390, "height": 844, "phone": True, "dark": True},
    }
    with Browser() as browser:
        for name, window in windows.items():
            browser.open(options.url, **window)
            browser.drop([chart_of(8)])
            print(browser.ask("which bar is the highest?"))
            browser.run("$('think').click(); $('inside').click()")
            print(browser.ask("which bar is the lowest?"))
            browser.run("document.querySelector('details').open = true")
            browser.run("document.querySelectorAll('.words button')[7].onclick()")
            browser.run("$('log').scrollTop = $('log').scrollHeight")
            browser.photograph(options.out / name)


if __name__ == "__main__":
    command(take_screenshots)
