"""`checkpointer worker` as a process of its own, and what its tests put and look at."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import psycopg
from helpers import wait_until
from langgraph.checkpoint.base import empty_checkpoint

if TYPE_CHECKING:
    import signal
    from pathlib import Path

_RUN = "from checkpointer.cli import main; main()"
_number = itertools.count()


class WorkerProcess:
    """One worker; its output goes to a file."""

    def __init__(self, folder: Path, postgres_uri: str, redis_url: str, *arguments: str) -> None:
        self._log = folder / f"worker-{next(_number)}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _RUN, "worker", *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | {"POSTGRES_URI": postgres_uri, "REDIS_URL": redis_url},
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str) -> str:
        """Wait until the output has something that matches, and return it."""

        def found() -> str:
            match = re.search(pattern, self.output)
            assert match or self._process.poll() is None, self.output
            return match[0] if match else ""

        return wait_until(found, timeout=60, message=f"the worker says {pattern!r}")

    def started(self) -> WorkerProcess:
        self.wait_for("Flushing ")
        return self

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def ended(self, timeout: float = 60) -> int:
        """Wait for the end and return the exit code."""
        return self._process.wait(timeout)

    def close(self) -> None:
        """Kill it, if it runs."""
        self._process.kill()
        self._process.wait()


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def put_threads(saver: Any, count: int, name: str = "t") -> set[str]:
    """Put one checkpoint with a blob in each of some threads, and return their ids."""
    threads = {f"{name}{number}" for number in range(count)}
    for thread in sorted(threads):
        checkpoint = empty_checkpoint()
        checkpoint["channel_values"] = {"xs": [1]}
        checkpoint["channel_versions"] = {"xs": "1"}
        saver.put(config(thread), checkpoint, {"source": "loop", "step": 1}, {"xs": "1"})
    return threads


def saved_threads(uri: str) -> set[str]:
    with psycopg.connect(uri, autocommit=True) as conn:
        return {row[0] for row in conn.execute("SELECT DISTINCT thread_id FROM checkpoints")}


def get(url: str | None, path: str) -> tuple[int, str]:
    """Ask over HTTP; returns the status and the text."""
    assert url
    try:
        with urllib.request.urlopen(url + path, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()
