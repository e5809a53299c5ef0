"""What the processes of `error_store_fire.py` do: report errors from several threads, and keep books of them.

Not here: the faults and the audit. Half of the processes have the quota of every process, so that most of what they
report is folded; the others have none, so that they write as many rows as they can.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
from collections import Counter
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from checkpointer.events import CheckpointEvent
from checkpointer.hooks import HookContext
from observability import Observability
from observability.errors import SYSTEM_ERRORS, SystemErrorStore
from observability.errors.fingerprint import fingerprint_of
from observability.projections import operator_view

THREADS = 2
PREFIX = "fire"

# Few enough for each to have its own count in spite of the quota.
_KINDS = "abcdefghij"
_SEVERITIES: Any = ("warning", "error", "critical")


def context_of(postgres_uri: str, redis_url: str) -> HookContext:
    """Return the target that all processes share."""
    return HookContext(
        connect_postgres=lambda: psycopg.connect(postgres_uri, autocommit=True, connect_timeout=3),
        connect_redis=lambda: redis.Redis.from_url(
            redis_url, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        ),
        prefix=PREFIX,
        identity=PREFIX,
    )


class Reporter:
    """One thread's errors, and the books of them."""

    def __init__(self, target: Observability, name: str, rng: random.Random) -> None:
        self._target = target
        self._name = name
        self._rng = rng
        self.books: Counter[tuple[str, str, str, str]] = Counter()
        self.ways: Counter[str] = Counter()

    def report(self) -> None:
        """Report one error; now and then one that is delivered twice, or a sign that something has recovered."""
        event = self._event()
        row = operator_view(event)
        key = (fingerprint_of(row), row["error_type"], row["severity"], row["created_at"][:13])
        self.books[key] += 1
        way = self._target.errors.add(event)
        self.ways[way] += 1
        if way != "folded" and self._rng.random() < 0.05:
            self._target._outbox.add(SYSTEM_ERRORS, self._target.errors._row(event))
            self.ways["delivered twice"] += 1
        if self._rng.random() < 0.02:
            thread = self._thread(self._rng.random() < 0.5)
            recovered = CheckpointEvent(name="flush.recovered", severity="info", message="", thread_id=thread)
            self._target.errors.add_recoveries(recovered)
            self.ways["recoveries"] += 1

    def _thread(self, shared: bool) -> str:
        return f"t{self._rng.randrange(3)}" if shared else f"{self._name}-{self._rng.randrange(2000)}"

    def _event(self) -> CheckpointEvent:
        # Few threads with bursts, which all processes share, and many with errors of all kinds, which are this one's.
        shared = self._rng.random() < 0.6
        kind = self._rng.choice(_KINDS[::4] if shared else _KINDS)
        late = self._rng.random() < 0.05
        facts: dict[str, Any] = {
            "name": "flush.failed" if kind < "g" else "application.error",
            "error_type": "checkpoint_flush_error" if kind < "g" else "payment_error",
            "severity": self._rng.choices(_SEVERITIES, (4, 5, 1))[0],
            "message": f"Something of kind {kind} failed after {self._rng.random():.3f} s.",
            "thread_id": self._thread(shared),
            "component": "flusher",
        }
        event = CheckpointEvent(**facts)
        if not late:
            return event
        earlier = event.occurred_at.astimezone(UTC) - timedelta(seconds=self._rng.uniform(1, 3_000))
        return CheckpointEvent(**facts, occurred_at=earlier)


def run(number: int, events: int, seed: int, folder: str, postgres_uri: str, redis_url: str, progress: Any) -> None:
    """Report errors, and leave the books in the folder; `progress[number]` counts those reported."""
    logging.getLogger("checkpointer.observability").setLevel(logging.ERROR)
    os.environ["CHECKPOINTER_SPOOL_DIR"] = str(Path(folder, "spool"))
    target = Observability(context_of(postgres_uri, redis_url))
    if number % 2:
        target.errors = SystemErrorStore(target._outbox, PREFIX, quotas=())
    reporters = [Reporter(target, f"p{number}", random.Random(f"{seed}-{number}-{i}")) for i in range(THREADS)]
    lock = threading.Lock()

    def work(reporter: Reporter, count: int) -> None:
        for _ in range(count):
            reporter.report()
            with lock:
                progress[number] += 1

    threads = [
        threading.Thread(target=work, args=(reporter, events // THREADS + (i < events % THREADS)))
        for i, reporter in enumerate(reporters)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    target.close(60)
    books: Counter[tuple[str, ...]] = Counter()
    ways: Counter[str] = Counter()
    for reporter in reporters:
        books.update(reporter.books)
        ways.update(reporter.ways)
    Path(folder, f"{number}.json").write_text(json.dumps([[[*key, n] for key, n in books.items()], ways]))
