"""Take the picture of the console in the documents: `python docs/screenshot.py` (needs playwright and a Chromium).

It runs `checkpointer demo`, signs in by its link when the story is over, and writes docs/images/console.png; with a folder as
argument all pages, in light and dark and as a phone shows them, for looking at. Not here: claims about the pages
(`tests/console`).
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

_PICTURE = Path(__file__).parent / "images" / "console.png"
_PAGES = {
    "overview": "",
    "errors": "errors?state=all",
    "groups": "groups?status=all",
    "threads": "threads",
    "thread": "thread?thread=chen",
    "dead-letters": "dead-letters?all=yes",
    "audit": "audit",
}
_WIDE = {"width": 1200, "height": 800}
_PHONE = {"width": 390, "height": 844}


def _shoot(browser: Browser, link: str, path: Path, page: str = "", scheme: str = "light", phone: bool = False) -> None:
    context = browser.new_context(
        viewport=_PHONE if phone else _WIDE,  # type: ignore[arg-type]  # a dictionary does as well
        color_scheme=scheme,  # type: ignore[arg-type]  # a literal
    )
    tab = context.new_page()
    address, token = link.split("#")
    tab.goto(f"{address}{page}#{token}")
    tab.get_by_role("button", name="Sign out").wait_for()
    tab.wait_for_load_state("networkidle") if page else tab.wait_for_timeout(500)
    tab.screenshot(path=path, full_page=bool(page) or phone)
    context.close()


def main(folder: Path | None) -> None:
    """Run the demo and take pictures of its end."""
    command = [sys.executable, "-u", "-c", "from checkpointer.cli import main; main()", "demo", "--no-open", "--pace", "1"]
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
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            _shoot(browser, link, _PICTURE)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                for name, page in _PAGES.items():
                    for scheme in ("light", "dark"):
                        _shoot(browser, link, folder / f"{name}-{scheme}.png", page, scheme)
                    _shoot(browser, link, folder / f"{name}-phone.png", page, phone=True)
        finally:
            demo.send_signal(signal.SIGINT)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
