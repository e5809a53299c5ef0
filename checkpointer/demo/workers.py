"""Real `checkpointer worker` processes: started, seen, killed.

Not here: what a worker does (`checkpointer/worker.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Self

from checkpointer.errors import CheckpointerError

if TYPE_CHECKING:
    from pathlib import Path

    from checkpointer.embedded import Servers

__all__ = ["WorkerProcess"]

_END_SECONDS = 20.0
_ARGUMENTS = ("--flush-age", "0.2", "--drain-timeout", f"{_END_SECONDS / 2:g}")


class WorkerProcess:
    """One worker; use it under `with`, which ends it.

    Attributes:
        name: Its name; Postgres knows it as the name of the application.
        pid: Its process id.
    """

    def __init__(self, name: str, servers: Servers, folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "checkpointer.demo.tether", "worker", *_ARGUMENTS],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # A folder without modules: the child has to find those that this process has.
                cwd=folder,
                env=os.environ
                | {"POSTGRES_URI": servers.postgres_uri, "REDIS_URL": servers.redis_url, "PGAPPNAME": name},
                # Ctrl-C in the terminal is for the demo, which then ends its workers.
                start_new_session=True,
            )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def is_flushing(self) -> bool:
        """Tell whether it has begun its work.

        Raises:
            CheckpointerError: It has ended instead.
        """
        said = self._log.read_text(errors="replace")
        if self._process.poll() is not None:
            raise CheckpointerError(f"{self.name} has ended while starting: {said[-500:].strip()}")
        return "Flushing " in said

    def kill(self) -> None:
        """SIGKILL it and wait for its end; does nothing if it has ended."""
        self._process.kill()
        self._process.wait(_END_SECONDS)

    def drain(self) -> int:
        """Ask it to flush what is left and to end.

        Returns:
            Its exit code: 0 if all is in Postgres, negative if it had to be killed.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.returncode
