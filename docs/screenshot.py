"""Take the picture of the console in the documents: `python docs/screenshot.py` (needs playwright and a Chromium).

It runs `checkpointer demo`, signs in by its link when the story is over, and writes docs/images/console.png; with a
folder as argument all pages, in light and dark and as a phone shows them, for looking at. Not here: claims about the
pages (`tests/console`).
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, ViewportSize, sync_playwright

_PICTURE = Path(__file__).parent / "images" / "console.png"
_PAGES = {
    "overview": "",
    "errors": "errors?state=all",
    "groups": "groups?status=unresolved&status=resolved&status=regressed",
    "threads": "threads",
    "thread": "thread?thread=chen",
    "dead-letters": "dead-letters?all=yes",
    "audit": "audit",
}
_WIDE: ViewportSize = {"width": 1200, "height": 800}
_PHONE: ViewportSize = {"width": 390, "height": 844}


class _Camera:
    """Takes pictures of pages for which one has to be signed in."""

    def __init__(self, browser: Browser, link: str) -> None:
        self._browser = browser
        self._address = link.partition("#")[0]
        with browser.new_context() as context:
            tab = context.new_page()
            tab.goto(link)
            tab.get_by_role("button", name="Sign out").wait_for()
            self._signed_in = context.storage_state()

    def shoot(
        self, path: Path, page: str = "", scheme: Literal["light", "dark"] = "light", *, phone: bool = False
    ) -> None:
        viewport = _PHONE if phone else _WIDE
        with self._browser.new_context(
            storage_state=self._signed_in, viewport=viewport, color_scheme=scheme
        ) as context:
            tab = context.new_page()
            tab.goto(f"{self._address}{page}")
            tab.screenshot(path=path, full_page=bool(page) or phone)


def main(folder: Path | None) -> None:
    """Run the demo and take pictures of its end."""
    command = [
        sys.executable,
        "-u",
        "-c",
        "from checkpointer.cli import main; main()",
        "demo",
        "--no-open",
        "--pace",
        "1",
    ]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo,
        sync_playwright() as playwright,
    ):
        assert demo.stdout is not None
        told = ""
        for line in demo.stdout:
            told += line
            if "Ctrl-C ends" in line:
                break
        try:
            (link, *_) = re.findall(r"http://\S+#token=\S+", told)
            camera = _Camera(playwright.chromium.launch(executable_path=shutil.which("chromium")), link)
            camera.shoot(_PICTURE)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                for name, page in _PAGES.items():
                    camera.shoot(folder / f"{name}-light.png", page)
                    camera.shoot(folder / f"{name}-dark.png", page, "dark")
                    camera.shoot(folder / f"{name}-phone.png", page, phone=True)
        finally:
            demo.send_signal(signal.SIGINT)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
