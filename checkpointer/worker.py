"""A worker: a process that only flushes, for operators who run some beside the applications.

Not here: flushing (`flush/flusher.py`, of which a worker runs several, each for its share of the partitions) and the
answers over HTTP (`worker_http.py`). Workers, and the flushers of the applications, need not know of each other: who
holds a partition's row lock in Postgres flushes it, and a lock is gone when its holder dies or stands still.

A worker flushes by age alone. Whatever waits for long enough is its business, whoever put it, so there is nothing
special about the start, and what an application flushes by itself in time never concerns a worker.

Words: to *drain* is to flush all that the buffer held when the draining began.
"""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from checkpointer import worker_http
from checkpointer.core import Core
from checkpointer.errors import (
    ClosedError,
    ConfigurationError,
    NotSetUpError,
    StoreUnavailableError,
    TierUnavailableError,
)
from checkpointer.events import CheckpointEvent
from checkpointer.flush.report import FlushTotals
from checkpointer.flush.session import check_partitions
from checkpointer.options import BufferOptions
from checkpointer.search_path import with_search_path
from checkpointer.store import schema
from checkpointer.store.clients import check_conninfo
from checkpointer.store.deadline import Limit, LimitedConnection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

    from checkpointer.flush.backlog import Backlog
    from checkpointer.flush.flusher import Flusher
    from checkpointer.flush.report import FlushReport
    from checkpointer.hooks import Hooks
    from checkpointer.instruments import Instruments

__all__ = ["Worker", "DrainReport"]

T = TypeVar("T")

logger = logging.getLogger("checkpointer.worker")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SIGNAL_TURN = 0.5
_DRAIN_PAUSE = 0.2
# Seconds between two looks at the servers: a supervisor asks whether the worker is ready.
_LOOK_PAUSE = 1.0

_STORED_PARTITIONS = "SELECT partitions FROM checkpoint_buffers WHERE prefix = %s"


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What a worker leaves behind; true if all that the buffer held when it began to drain is in Postgres.

    Attributes:
        drained: Whether it is.
        backlog: What is left in the buffer; None if it is drained, or if Redis cannot be asked.
        reason: Why something is left; empty if nothing is.
    """

    drained: bool = True
    backlog: Backlog | None = None
    reason: str = ""

    def __bool__(self) -> bool:
        """Whether all is in Postgres."""
        return self.drained

    def __str__(self) -> str:
        """Say it to people."""
        if self.drained:
            return "The buffer is drained."
        left = "An unknown number of records"
        if self.backlog is not None:
            left = (
                f"{self.backlog.records} records of {self.backlog.threads} threads, the oldest of them "
                f"{self.backlog.oldest_seconds:.0f} s old,"
            )
        return (
            f"{left} could not be flushed before the worker had to stop: {self.reason} They are still in Redis, and "
            "the next worker or application on this buffer flushes them."
        )


class Worker:
    """Flushes what all applications of one prefix buffer.

    Use it under `with`, or call `start()` and `stop()`; or let `run()` do both and wait for a signal between them.

    Args:
        postgres_uri: Postgres, as `postgresql://user:password@host:port/db` or `key=value` pairs.
        redis_url: Redis or Valkey, as `redis://`, `rediss://` or `unix://`.
        partitions: The application's number of partitions; by default what Postgres has noted for the prefix, or the
            saver's default if no saver was ever set up with it.
        concurrency: How many threads flush, each with a connection to Postgres of its own.
        drain_timeout: How long `stop()` tries to flush what is buffered.
        http: Where to answer `/healthz`, `/readyz` and `/metrics`, as `host:port`; port 0 takes any free one.
            By default nowhere: several workers on one machine could not share a port.
        stall_timeout: A flush that has not finished a batch for so long makes `/healthz` answer 503.
        **settings: Fields of `BufferOptions`; of those, `prefix`, `flush_age`, `batch_records`, `batch_bytes`, the
            time-outs, `clean_ttl` and `hooks` mean something to a worker.

    Raises:
        ConfigurationError: An argument cannot work; nothing was started.
    """

    def __init__(
        self,
        postgres_uri: str,
        redis_url: str,
        *,
        partitions: int | None = None,
        concurrency: int = 4,
        drain_timeout: float = 30.0,
        http: str | None = None,
        stall_timeout: float = 60.0,
        **settings: Any,
    ) -> None:
        if "triggers" in settings:
            raise ConfigurationError("A worker flushes by age alone: leave triggers out, and set flush_age.")
        check_conninfo(postgres_uri)
        for name, value, low in (
            ("concurrency", concurrency, 1),
            ("drain_timeout", drain_timeout, 0),
            ("stall_timeout", stall_timeout, 0.1),
        ):
            if not low <= value <= 86_400:
                raise ConfigurationError(f"{name}={value!r}: use a number from {low:g} to 86400.")
        given = {} if partitions is None else {"partitions": partitions}
        self._options = BufferOptions.from_mapping({**settings, **given, "triggers": {"age"}})
        self._partitions = partitions
        self._postgres_uri = postgres_uri
        self._redis_url = redis_url
        self._concurrency = concurrency
        self._drain_timeout = drain_timeout
        self._address = None if http is None else worker_http.parse_address(http)
        self._stall_timeout = stall_timeout
        self._lock = threading.Lock()
        self._core: Core | None = None
        self._flushers: list[Flusher] = []
        self._server: worker_http.Server | None = None
        # A signal handler may put something even while this very thread is inside `get`.
        self._wake: SimpleQueue[int | None] = SimpleQueue()
        self._draining = False
        self._closing = threading.Event()
        self._report: DrainReport | None = None

    # -- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Check both servers and begin to flush; does nothing if the worker runs.

        Raises:
            ClosedError: The worker was stopped.
            ConfigurationError: The application has another number of partitions, or the HTTP address cannot be used.
            NotSetUpError: Tables are missing.
            StoreUnavailableError: Postgres cannot be reached.
            BufferUnavailableError: Redis cannot be reached.
        """
        with self._lock:
            if self._report is not None:
                raise ClosedError("The worker was stopped: make a new one.")
            if self._core is not None:
                return
            options = replace(self._options, partitions=self._find_partitions())
            core = Core(
                self._postgres_uri,
                self._redis_url,
                async_conn=None,
                async_redis=None,
                options=options,
                look_pause=_LOOK_PAUSE,
            )
            try:
                core.redis.info()
                if self._address is not None:
                    self._server = worker_http.Server(self._address, self)
            except BaseException:
                core.close()
                raise
            self._core, self._options = core, options
            count = min(self._concurrency, options.partitions)
            # Shares of their own keep the threads of one worker from competing for the same rows; that workers begin at
            # different places keeps those of several from it most of the time.
            first = random.randrange(options.partitions)
            order = [*range(first, options.partitions), *range(first)]
            self._flushers = [core.make_flusher(order[n::count]) for n in range(count)]
            for flusher in self._flushers:
                flusher.start()
            core.watcher.start()
            if self._server is not None:
                self._server.start()
        logger.info("Flushing %r: %d partitions, %d threads.", options.prefix, options.partitions, count)
        if self._server is not None:
            logger.info("Health and metrics are at %s/healthz, /readyz and /metrics.", self._server.url)

    def run(self) -> DrainReport:
        """Work until SIGTERM, SIGINT or `stop()`, then drain.

        Signals are only minded in the main thread. A second one ends the process at once; nothing is lost by that.

        Returns:
            What is left in the buffer.

        Raises:
            CheckpointerError: See `start`.
        """
        with self._minding_signals():
            self.start()
            number = self._sleep()
            if number is not None:
                name = signal.Signals(number).name
                logger.info("%s: draining for at most %g s. Once more ends at once.", name, self._drain_timeout)
            return self.stop()

    def _sleep(self) -> int | None:
        """Wait for a signal or for `stop()`; returns the signal's number."""
        while True:
            # In turns: if the kernel gives the signal to another thread, its handler waits until this one wakes up.
            with contextlib.suppress(Empty):
                return self._wake.get(timeout=_SIGNAL_TURN)

    def stop(self) -> DrainReport:
        """Drain, for at most `drain_timeout`, and close everything. May be called again, from any thread.

        Returns:
            What is left in the buffer.
        """
        with self._lock:
            if self._report is None:
                self._report = self._stop()
        self._wake.put(None)
        return self._report

    @contextlib.contextmanager
    def _minding_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def first(number: int, frame: FrameType | None) -> None:
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            self._wake.put(number)

        before = {each: signal.signal(each, first) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _find_partitions(self) -> int:
        """Return the prefix's number of partitions."""
        try:
            with LimitedConnection.connect(self._postgres_uri, autocommit=True, **self._connection_settings()) as conn:
                conn.limit = Limit(self._options.query_timeout)
                if missing := schema.pending(conn):
                    raise NotSetUpError(
                        f"The tables are missing or out of date ({len(missing)} migrations are pending, {missing[0]} "
                        "first): run `checkpointer migrate`, or saver.setup() in the application."
                    )
                row = conn.execute(_STORED_PARTITIONS, (self._options.prefix,), prepare=False).fetchone()
        except psycopg.OperationalError as exc:
            raise StoreUnavailableError(f"Postgres cannot be reached: {exc}") from exc
        if row is None:
            return self._options.partitions
        if self._partitions is not None:
            check_partitions(self._options, row[0])
        return int(row[0])

    def _connection_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"connect_timeout": max(2, round(self._options.postgres_timeout))}
        if self._options.schema is not None:
            given = conninfo_to_dict(self._postgres_uri).get("options")
            settings["options"] = with_search_path(None if given is None else str(given), self._options.schema)
        return settings

    # -- draining ------------------------------------------------------------------------------------------------

    def _stop(self) -> DrainReport:
        self._draining = True
        core = self._core
        if core is None:
            return DrainReport()
        reason = self._drain(time.monotonic() + self._drain_timeout)
        with ThreadPoolExecutor(len(self._flushers)) as closing:
            list(closing.map(lambda flusher: flusher.close(0.0), self._flushers))
        report = DrainReport() if reason is None else self._what_is_left(core, reason)
        if not report:
            core.hooks.emit(
                CheckpointEvent(
                    name="worker.not_drained",
                    error_type="checkpoint_flush_error",
                    severity="warning",
                    message=str(report),
                    component="flusher",
                    operation="drain",
                    outcome="buffered",
                    context={
                        "waiting_records": report.backlog.records if report.backlog else None,
                        "waiting_threads": report.backlog.threads if report.backlog else None,
                    },
                )
            )
        self._closing.set()
        if self._server is not None:
            self._server.close()
        core.close()
        return report

    def _drain(self, deadline: float) -> str | None:
        """Flush all that is buffered now; returns why that was not possible in time, if it was not."""
        waiting, reason = list(self._flushers), "the time was over."
        while waiting:
            futures = [(flusher, flusher.flush(None)) for flusher in waiting]
            waiting = []
            for flusher, future in futures:
                try:
                    report = future.result(max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    waiting.append(flusher)
                else:
                    if not report:
                        waiting.append(flusher)
                        reason = _reason(report)
            if not waiting:
                return None
            if (left := deadline - time.monotonic()) <= 0:
                break
            self._closing.wait(min(_DRAIN_PAUSE, left))
        return reason

    def _what_is_left(self, core: Core, reason: str) -> DrainReport:
        session = core.make_session()
        try:
            backlog = session.backlog()
        except TierUnavailableError as exc:
            return DrainReport(False, None, str(exc))
        finally:
            session.close()
        # Others may have flushed what was left here.
        return DrainReport(False, backlog, reason) if backlog.records else DrainReport()

    # -- what can be watched -------------------------------------------------------------------------------------

    @property
    def hooks(self) -> Hooks:
        """Where to subscribe to events, once the worker was started.

        Raises:
            ClosedError: It was not.
        """
        if self._core is None:
            raise ClosedError("The worker was not started: call start() before.")
        return self._core.hooks

    @property
    def instruments(self) -> Instruments:
        """What the worker can be measured by, once it was started.

        Raises:
            ClosedError: It was not.
        """
        if self._core is None:
            raise ClosedError("The worker was not started: call start() before.")
        return self._core.instruments

    @property
    def prefix(self) -> str:
        """The prefix."""
        return self._options.prefix

    @property
    def url(self) -> str | None:
        """Where health and metrics are answered, without the path; None if nowhere."""
        return None if self._server is None else self._server.url

    @property
    def backlog(self) -> Backlog | None:
        """What waits in the buffer, as of the last look; None if Redis did not answer."""
        return None if self._core is None else self._core.watcher.backlog

    def totals(self) -> FlushTotals:
        """Return what the worker has flushed so far."""
        return FlushTotals.of_all([flusher.totals for flusher in self._flushers])

    def why_unhealthy(self) -> str | None:
        """Return why the process should be started anew; None if it works. An outage is no such reason."""
        stalled = max((flusher.stalled_for() for flusher in self._flushers), default=0.0)
        if stalled <= self._stall_timeout:
            return None
        return f"A thread has not finished a batch for {stalled:.0f} s." if stalled < 1e9 else "A thread has ended."

    def why_not_ready(self) -> str | None:
        """Return why nothing can be flushed now; None if both servers answered at the last look."""
        if self._draining:
            return "The worker is draining."
        if self._core is None or not (watcher := self._core.watcher).has_looked:
            return "The servers were not asked yet."
        return " ".join(filter(None, (watcher.redis_trouble, watcher.postgres_trouble))) or None


def _reason(report: FlushReport) -> str:
    return "other workers hold their partitions." if report.error is None else report.error.message
