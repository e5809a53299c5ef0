"""A bench for one fault: servers behind proxies, savers that keep books, and the audit at the end.

Not here: the faults and the claims, which are the tests'.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from audit import Books, Log, RecordingSaver, audit
from fault_graph import turn
from helpers import wait_until
from proxy import proxied

from checkpointer import BufferedPostgresSaver, TierUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from checkpointer import CheckpointEvent


class BenchSaver(RecordingSaver):
    """A saver that keeps books and its events."""

    events: list[CheckpointEvent]

    def named(self, name: str, **fields: Any) -> list[CheckpointEvent]:
        """Return the events of this name so far."""
        return [e for e in self.events if e.name == name and all(getattr(e, f) == v for f, v in fields.items())]


class Bench:
    """See the module.

    Attributes:
        postgres_uri: The database itself.
        redis_url: The buffer itself.
        postgres: The proxy before the database, which savers use.
        redis: The proxy before the buffer, which savers use.
        log: What was tried and acknowledged.
    """

    def __init__(self, postgres_uri: str, redis_url: str, prefix: str, folder: Path) -> None:
        self._stack = ExitStack()
        self.postgres_uri = postgres_uri
        self.redis_url = redis_url
        self.prefix = prefix
        self.log = Log(folder / "log")
        self._stack.callback(self.log.close)
        self.postgres_through, self.postgres = self._stack.enter_context(proxied(postgres_uri))
        self.redis_through, self.redis = self._stack.enter_context(proxied(redis_url))
        with self.plain() as saver:
            saver.setup()

    def plain(self, **options: Any) -> BufferedPostgresSaver:
        """Return a saver that reaches the servers whatever the proxies do, and works only when told to."""
        options = {"hooks": (), "prefix": self.prefix, "triggers": frozenset(), **options}
        return BufferedPostgresSaver.from_conn_string(self.postgres_uri, redis_url=self.redis_url, **options)

    def saver(self, *, direct: bool = False, **options: Any) -> BenchSaver:
        """Return a saver that keeps books; `direct` goes past the proxies."""
        times = {"flush_age": 0.05, "postgres_timeout": 1.0, "redis_timeout": 1.0, "close_timeout": 2.0}
        options = {"hooks": (), "prefix": self.prefix, **times, **options}
        addresses = (self.postgres_uri, self.redis_url) if direct else (self.postgres_through, self.redis_through)
        saver: Any = BenchSaver.from_conn_string(addresses[0], redis_url=addresses[1], **options)
        saver.log = self.log
        saver.events = []
        saver.hooks.add(saver.events.append)
        self._stack.callback(saver.close)
        saver.setup()
        return saver  # type: ignore[no-any-return]  # the base class names itself

    def recovered(self, saver: BenchSaver) -> None:
        """Wait until a saver has nothing left to flush, by its own efforts."""
        wait_until(lambda: not saver._core.ledger.records, timeout=30, message="all is flushed")

    def wait_for_puts(self) -> None:
        """Wait until a few more calls have been acknowledged."""
        size = self.log.path.stat().st_size
        wait_until(lambda: self.log.path.stat().st_size > size + 5_000, timeout=30, message="puts are acknowledged")

    def under_load(self, saver: BenchSaver, faults: Callable[[], None]) -> None:
        """Run graphs in two threads until `faults` has returned; typed errors are met by going on."""
        stop = threading.Event()
        trouble: list[BaseException] = []

        def work(thread: str) -> None:
            while not stop.wait(0.05):
                try:
                    turn(saver, thread)
                except TierUnavailableError:
                    continue
                except BaseException as exc:  # noqa: BLE001 - the test fails for it
                    trouble.append(exc)
                    return

        workers = [threading.Thread(target=work, args=(thread,)) for thread in ("t", "u")]
        for worker in workers:
            worker.start()
        try:
            faults()
        finally:
            stop.set()
            for worker in workers:
                worker.join(60)
            assert not trouble, trouble

    def audit(self) -> Books:
        """Flush what is left, and check that all that was acknowledged is there, and nothing else."""
        with self.plain() as saver:
            wait_until(saver.flush, timeout=30, message="all is flushed")
        books = Books()
        books.read(self.log.lines())
        findings = audit(self.postgres_uri, books)
        assert not findings, f"\n{findings}"
        assert books.puts, "nothing was acknowledged: the test shows nothing"
        return books

    def close(self) -> None:
        self.postgres.allow()
        self.redis.allow()
        self._stack.close()
