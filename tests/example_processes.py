"""Runs the commands that the READMEs of the examples name, as processes, from the repository's folder."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def commands(example: str) -> list[str]:
    """Return the lines of a README's shell blocks."""
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (EXAMPLES / example / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def arguments(command: str, *more: str) -> list[str]:
    """Return the words of a command without the settings before it, for this environment's programs."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    folder = Path(sys.executable).parent
    return [sys.executable if words[0] == "python" else str(folder / words[0]), *words[1:], *more]


class Process:
    """A program whose output goes to a file; ended with its block."""

    def __init__(self, words: list[str], folder: Path, cwd: Path = ROOT, **environment: str) -> None:
        self._log = folder / f"output-{len(list(folder.glob('output-*')))}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                words, cwd=cwd, env=clean(environment), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            # In order, so that private servers end too.
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._stdin.close()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str, count: int = 1) -> str:
        """Wait until the output has so many matches, and return the last: its first group, if it has one."""

        def found() -> str:
            matches = re.findall(pattern, self.output)
            assert len(matches) >= count or self._process.poll() is None, self.output
            return matches[-1] if len(matches) >= count else ""

        return wait_until(found, timeout=90, message=f"the program says {pattern!r}")

    def type(self, line: str) -> None:
        self._stdin.write(f"{line}\n".encode())
        self._stdin.flush()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self._process.send_signal(number)
        return self._process.wait(90)


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without addresses of servers, and with what is given."""
    names = ("POSTGRES_URI", "REDIS_URL", "CHECKPOINTER_PREFIX", "CHECKPOINTER_SCHEMA")
    return {name: value for name, value in os.environ.items() if name not in names} | {
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
