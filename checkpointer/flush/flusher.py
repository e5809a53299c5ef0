"""The flusher: one thread for each saver that brings what is buffered to Postgres, and does the barriers' work.

Not here: the transaction (`session.py`). It wakes up when a run ends, when records get old or many, when
somebody asks, and at start for what an earlier process left. An outage is retried with backoff, for ever, and
nothing is dropped. Synchronous and asynchronous callers hand it *jobs* and wait for a future.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from checkpointer.errors import (
    BufferUnavailableError,
    CheckpointerError,
    ClosedError,
    FlushIncompleteError,
    TierUnavailableError,
)
from checkpointer.events import CheckpointEvent, ErrorInfo, describe_error
from checkpointer.flush import poison, run_end
from checkpointer.flush.report import FlushReport
from checkpointer.flush.session import Progress, Session
from checkpointer.instruments import Measured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from checkpointer.flush.ledger import Debt, Ledger, Owed
    from checkpointer.flush.report import FlushTotals
    from checkpointer.instruments import Instruments
    from checkpointer.options import BufferOptions
    from checkpointer.watermarks import WaterMarks

T = TypeVar("T")

_FIRST_BACKOFF = 0.2
_LONGEST_BACKOFF = 5.0
_SWEEP_SECONDS = 20.0
_PINNED_PAUSE = 30.0
# Runs that end together are flushed together: a transaction for each would cost the others more than a short wait.
_GATHER_SECONDS = 0.05


@dataclass(slots=True)
class _Job:
    work: Callable[[Session], Any]
    future: Future[Any]


class Flusher:
    """See the module. Started by its first use; a daemon thread, so that it never keeps a process alive.

    Args:
        session: The thread's connections.
        ledger: What this process owes.
        options: The saver's settings.
        emit: Takes events.
        marks: Learns from scans how full the buffer is.
        instruments: Measure flushes.
    """

    def __init__(
        self,
        session: Session,
        ledger: Ledger,
        options: BufferOptions,
        emit: Callable[[CheckpointEvent], None],
        marks: WaterMarks,
        instruments: Instruments,
    ) -> None:
        self._session = session
        self.ledger = ledger
        self._options = options
        self._emit = emit
        self._marks = marks
        self._instruments = instruments
        self._cond = threading.Condition()
        self._thread: threading.Thread | None = None
        self._jobs: deque[_Job] = deque()
        # Who waits for a thread's records up to a sequence number to be in Postgres.
        self._waiters: dict[str, list[tuple[int, Future[None]]]] = {}
        self._urgent: set[str] = set()
        self._urgent_at = 0.0
        self._all_urgent = False
        # Threads whose run has ended: they are closed once they are flushed.
        self._ended: set[str] = set()
        self._next_sweep = time.monotonic() + _SWEEP_SECONDS
        self._closed = False
        self._recover = "start" in options.triggers
        self._next_scan = 0.0
        self._retry_at = 0.0
        self._backoff = _FIRST_BACKOFF
        self._attempt = 0
        self._next_look = 0.0
        # Threads whose users were told of the current trouble.
        self._troubled: set[str] = set()
        # Threads whose users were told that something waits; also added to from other threads.
        self._waited_for: set[str] = set()
        # The dead letters that this process has told of, by thread.
        self._told: dict[str, int] = {}
        self._listening = False
        self._busy_since: float | None = None

    # -- from any thread -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, if it does not run."""
        if self._thread is not None or self._closed:
            return
        with self._cond:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="checkpointer-flusher", daemon=True)
                self._thread.start()
                if "run_end" in self._options.triggers:
                    self._listening = True
                    run_end.handler().add(self)

    @property
    def totals(self) -> FlushTotals:
        """What was flushed so far."""
        return self._session.totals

    def stalled_for(self) -> float:
        """Return for how many seconds the thread has been at work without finishing a batch; infinite if it ended."""
        thread, busy_since = self._thread, self._busy_since
        if thread is None or not thread.is_alive():
            return math.inf
        return 0.0 if busy_since is None else time.monotonic() - max(busy_since, self.totals.progress_at)

    def submit(self, work: Callable[[Session], T]) -> Future[T]:
        """Have work done in the flusher's thread, in turn.

        Raises:
            ClosedError: The flusher is closed.
        """
        self.start()
        future: Future[T] = Future()
        with self._cond:
            if self._closed:
                raise ClosedError("The saver is closed: open a new one.")
            self._jobs.append(_Job(work, future))
            self._cond.notify_all()
        return future

    def flush(self, threads: Sequence[str] | None) -> Future[FlushReport]:
        """Flush these threads, or everything that is buffered; the future does not fail for an outage."""
        return self.submit(lambda session: self._flush_now(session, threads))

    def flush_soon(self, thread: str, upto: int) -> Future[None]:
        """Flush a thread; what many callers ask for meanwhile shares a transaction.

        The future fails with a `CheckpointerError` if the records up to this sequence number are not in Postgres then.

        Raises:
            ClosedError: The flusher is closed.
        """
        self.start()
        future: Future[None] = Future()
        with self._cond:
            if self._closed:
                raise ClosedError("The saver is closed: open a new one.")
            self._waiters.setdefault(thread, []).append((upto, future))
            self._cond.notify_all()
        return future

    def wake(self, threads: Iterable[str]) -> None:
        """Have these threads flushed soon, together with those of which the same is said in the next moment."""
        self.start()
        with self._cond:
            if not self._urgent:
                self._urgent_at = time.monotonic() + _GATHER_SECONDS
                self._cond.notify_all()
            self._urgent.update(threads)

    def wake_all(self) -> None:
        """Have all that this process owes flushed soon; many callers may say so at once."""
        if self._all_urgent:
            return
        self.start()
        with self._cond:
            self._all_urgent = True
            self._cond.notify_all()

    def tell_when_saved(self, thread: str) -> None:
        """Have `flush.recovered` told once what is buffered of a thread is in Postgres."""
        self._waited_for.add(thread)

    def run_ended(self, thread_id: str, active: frozenset[str]) -> None:
        """Flush what an ended run has left: its thread, and others that no run is working on."""
        ready = {thread for thread in self.ledger.threads() if thread == thread_id or thread not in active}
        if self.ledger.works_on(thread_id):
            ready.add(thread_id)  # it may be flushed, but it is not closed yet
        if ready:
            with self._cond:
                self._ended |= ready
            self.wake(ready)

    def close(self, timeout: float) -> None:
        """Flush what this process owes, if so set, and stop. May be called again."""
        if self._listening:
            run_end.handler().discard(self)
        deadline = time.monotonic() + timeout
        if "close" in self._options.triggers and not self._closed:
            self._flush_until(deadline)
        with self._cond:
            self._closed = True
            self._cond.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
            self._session.interrupt()
            thread.join(0.5)
            self._session.give_up()
            thread.join(0.5)
        for job in self._jobs:
            job.future.set_exception(ClosedError("The saver was closed before its turn came."))
        self._jobs.clear()
        for _, future in (waiter for waiters in self._waiters.values() for waiter in waiters):
            future.set_exception(ClosedError("The saver was closed before its turn came."))
        self._waiters.clear()

    def _flush_until(self, deadline: float) -> None:
        while self.ledger.records and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError, CheckpointerError):
                if self.flush(self.ledger.threads()).result(left):
                    continue
            # Another worker may be at it, or a server is on its way back.
            threading.Event().wait(min(0.2, max(0.0, deadline - time.monotonic())))

    def forget(self) -> None:
        """In a forked child: the parent's thread, connections and debts are not ours."""
        self._session.forget()
        self._cond = threading.Condition()
        self._thread = None
        self._jobs.clear()
        self._waiters.clear()
        self._urgent.clear()
        self._all_urgent = False
        self._ended.clear()
        self._troubled.clear()
        self._waited_for.clear()
        self._told.clear()

    # -- in the flusher's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._cond:
                if not self._jobs and not self._waiters and not self._closed and (pause := self._pause()) > 0:
                    self._cond.wait(pause)
                if self._closed:
                    break
                job = self._jobs.popleft() if self._jobs else None
                waiters, self._waiters = self._waiters, {}
            self._busy_since = time.monotonic()
            if waiters:
                self._flush_for(waiters)
            if job is None:
                if self._pause() <= 0:
                    self._background()
            elif job.future.set_running_or_notify_cancel():
                try:
                    job.future.set_result(job.work(self._session))
                except BaseException as exc:  # noqa: BLE001 - it belongs to whoever waits for the future
                    job.future.set_exception(exc)
            self._busy_since = None
        self._session.close()

    def _flush_for(self, waiters: dict[str, list[tuple[int, Future[None]]]]) -> None:
        progress = Progress()
        failure: Exception | None = None
        try:
            self.flush_threads(self._session, waiters, self._options.postgres_timeout, progress)
        except Exception as exc:  # noqa: BLE001 - it belongs to whoever waits
            failure = exc
            self._report_failure(exc, set(waiters))
        for thread, asked in waiters.items():
            done = progress.done.get(thread, -1)
            for upto, future in asked:
                if not future.set_running_or_notify_cancel():
                    continue
                if done >= upto:
                    future.set_result(None)
                elif isinstance(failure, CheckpointerError):
                    future.set_exception(failure)
                else:
                    letter = progress.pinned.get(thread)
                    why = f"({type(failure).__name__})" if failure else "in time: another worker is at it"
                    error = FlushIncompleteError(
                        f"{letter.describe()}. It is still buffered."
                        if letter
                        else f"Thread {thread!r} could not be flushed {why}; it is still buffered."
                    )
                    error.__cause__ = failure
                    future.set_exception(error)

    def _pause(self) -> float:
        """Return the seconds until there is something to do unasked; at most a minute."""
        now = time.monotonic()
        due = now + 60.0
        if self._all_urgent or self._recover:
            due = now
        if self._urgent:
            due = min(due, self._urgent_at)
        if "age" in self._options.triggers:
            due = min(due, self._next_scan)
        return max(due, self._retry_at) - now

    def _background(self) -> None:
        """Flush what is due. Nothing that happens here may end the thread."""
        with self._cond:
            urgent, self._urgent = self._urgent, set()
            all_urgent, self._all_urgent = self._all_urgent, False
            ended, self._ended = self._ended, set()
        recovering = self._recover
        progress = Progress()
        recovered = Progress()
        age = self._options.flush_age
        try:
            wanted = dict.fromkeys([*urgent, *self.ledger.passed()])
            if all_urgent:
                wanted |= dict.fromkeys(self.ledger.threads())
            if recovering:
                found = self._session.dirty_threads()
                earlier = [thread for thread in found if not self.ledger.works_on(thread)]
                if earlier:
                    self.flush_threads(self._session, earlier, None, recovered)
                wanted |= dict.fromkeys(thread for thread in found if self.ledger.works_on(thread))
            elif "age" in self._options.triggers and time.monotonic() >= self._next_scan:
                self._next_scan = time.monotonic() + age / 2
                held = self._session.scan()
                self._marks.scanned(held)
                old = [partition for partition, (_, oldest) in held.items() if oldest >= age]
                wanted |= dict.fromkeys(self._session.dirty_threads(old, pinned=False))
                wanted |= dict.fromkeys(self.ledger.threads(older_than=age))
                if time.monotonic() >= self._next_look:
                    # Another process may have replayed or dropped a letter and died before it said so in Redis.
                    self._next_look = time.monotonic() + _PINNED_PAUSE
                    wanted |= dict.fromkeys(self._session.pinned_threads())
            wanted = {thread: None for thread in wanted if not self.ledger.is_pinned(thread)}
            if wanted:
                self.flush_threads(self._session, wanted, None, progress)
            self._close_threads(ended, progress)
        except Exception as exc:  # noqa: BLE001 - reported; the thread must live
            with self._cond:
                self._urgent |= urgent
                self._all_urgent |= all_urgent
                self._ended |= ended
            self._back_off()
            self._report_failure(exc, set(self.ledger.threads()))
            return
        self._recover = False
        self._backoff, self._attempt, self._retry_at = _FIRST_BACKOFF, 0, 0.0
        if recovered.checkpoints + recovered.writes:
            self._emit(
                CheckpointEvent(
                    name="recovery.found",
                    severity="info",
                    message=f"The buffer held {recovered.checkpoints} checkpoints of earlier runs; they are saved now.",
                    component="flusher",
                    operation="recover",
                    outcome="recovered",
                    checkpoint_count=recovered.checkpoints,
                    context={
                        "threads": len(recovered.done),
                        "thread_ids": list(recovered.done)[:1000],
                        "writes": recovered.writes,
                    },
                )
            )

    def _close_threads(self, ended: set[str], progress: Progress) -> None:
        """Close the threads whose runs have ended, and now and then those that are idle."""
        tokens = {
            thread: proof.token
            for thread, proof in progress.proofs.items()
            if thread in ended and proof.is_all and proof.token > 0
        }
        if tokens:
            self._session.close_threads(tokens)
        if "age" in self._options.triggers and time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + _SWEEP_SECONDS
            # Those of processes that have died, too.
            if behind := self._session.passed_by():
                self.flush_threads(self._session, behind, None, progress)
            self._session.close_idle()

    def flush_threads(
        self,
        session: Session,
        threads: Iterable[str],
        wait: float | None,
        progress: Progress,
        *,
        strict: bool = False,
        replays: Mapping[int, str | None] | None = None,
    ) -> int:
        """Flush threads, and settle what this process owes for them; in the flusher's thread.

        Args:
            session: The flusher's connections.
            threads: The threads.
            wait: Seconds to wait for a partition, or None to leave it to the worker that holds it.
            progress: What became of the threads is added to it, also if this raises.
            strict: Not to know whether something is lost is an error.
            replays: Dead letters to try again, and who wants that.

        Returns:
            How many acknowledged checkpoints and calls of pending writes turned out to be lost.

        Raises:
            TierUnavailableError: A server cannot be reached.
        """
        wanted = list(threads)
        # What is put from now on need not be in Postgres at the end.
        owed = self.ledger.sequences(wanted)
        try:
            with Measured(self._instruments, "flush_in_background"):
                session.flush(wanted, wait, progress, replays)
            self.ledger.caught_up(thread for thread in progress.done if thread not in progress.behind)
        except BaseException:
            self._settle(progress, owed)
            raise
        return self._settle(progress, owed, strict=strict)

    def audit(self, session: Session, threads: Sequence[str]) -> int:
        """Find out what of these threads is lost, because Redis has forgotten it; in the flusher's thread.

        Returns:
            How many acknowledged checkpoints and calls of pending writes are in neither server. They are reported.

        Raises:
            FlushIncompleteError: What Redis has of a thread could not be flushed.
            TierUnavailableError: A server cannot be reached.
        """
        progress = Progress()
        lost = self.flush_threads(session, threads, self._options.postgres_timeout, progress, strict=True)
        if any(thread not in progress.done for thread in threads):
            raise FlushIncompleteError(
                f"Thread {threads[0]!r} could not be flushed: another worker is at it. Try again."
            )
        return lost

    def _back_off(self) -> None:
        self._attempt += 1
        self._retry_at = time.monotonic() + self._backoff * random.uniform(0.7, 1.3)
        self._backoff = min(self._backoff * 2, _LONGEST_BACKOFF)

    def _flush_now(self, session: Session, threads: Sequence[str] | None) -> FlushReport:
        progress = Progress()
        wanted: dict[str, None] = dict.fromkeys(threads or ())
        failure: Exception | None = None
        try:
            if threads is None:
                wanted = dict.fromkeys(session.dirty_threads()) | dict.fromkeys(self.ledger.threads())
            self.flush_threads(session, wanted, self._options.postgres_timeout, progress)
        except Exception as exc:  # noqa: BLE001 - it goes into the report and becomes an event
            failure = exc
            self._attempt += 1
        open_threads = [t for t in wanted if t not in progress.done]
        if threads is None and failure is not None:
            open_threads = list(dict.fromkeys([*open_threads, *self.ledger.threads()]))
        report = FlushReport(
            threads=len(wanted),
            checkpoints=progress.checkpoints,
            blobs=progress.blobs,
            writes=progress.writes,
            waiting=sum(debt.records for t in open_threads if (debt := self.ledger.debt(t))),
            waiting_threads=open_threads[:100],
        )
        if failure is not None:
            report.error = describe_error(failure)
            self._report_failure(failure, set(open_threads))
        else:
            if progress.pinned:
                report.error = next(iter(progress.pinned.values())).report_error()
            self._report_incomplete([t for t in open_threads if t not in progress.pinned], report)
        return report

    # -- what it means -------------------------------------------------------------------------------------------

    def _settle(self, progress: Progress, owed: dict[str, int], *, strict: bool = False) -> int:
        """Take down what was paid, tell the threads that are out of trouble, and those that are in it."""
        total_lost = 0
        # Before what is said to have recovered, which is not to pass for a proof that nothing was lost.
        for thread, fields in progress.lost.items():
            self._emit(
                CheckpointEvent(
                    name="checkpoint.lost",
                    error_type="checkpoint_lost",
                    severity="critical",
                    message=f"{len(fields)} buffered records have vanished from Redis before they were flushed. Check "
                    "maxmemory-policy (it must be noeviction) and who else writes to this server.",
                    thread_id=thread,
                    component="buffer",
                    operation="flush",
                    outcome="lost",
                    checkpoint_count=sum(name.startswith(b"c\0") for name in fields),
                    user_notice=True,
                )
            )
        for thread, upto in progress.done.items():
            self.ledger.unpin(thread)
            self._told.pop(thread, None)
            debt = self.ledger.debt(thread)
            if debt is not None and thread in owed:
                suspect = self.ledger.is_suspect(thread)
                if suspect or not progress.proofs[thread].covers(debt, owed[thread]):
                    then = [one for one in debt.owed if one.sequence <= owed[thread]]
                    try:
                        lost = self._session.missing(thread, then)
                    except CheckpointerError:
                        if strict:
                            raise
                        self.ledger.suspect(thread)
                        continue  # it stays owed, and is looked for again
                    self._report_loss(thread, debt, lost)
                    total_lost += len(lost)
                self.ledger.paid(thread, max(upto, owed[thread]))
            else:
                self.ledger.paid(thread, upto)
            if thread in self._troubled or thread in self._waited_for:
                self._troubled.discard(thread)
                self._waited_for.discard(thread)
                self._emit(
                    CheckpointEvent(
                        name="flush.recovered",
                        severity="info",
                        message="The checkpoints that were waiting are saved.",
                        thread_id=thread,
                        run_id=debt.run_id if debt else None,
                        component="flusher",
                        operation="flush",
                        outcome="recovered",
                        checkpoint_count=len(debt.checkpoints) if debt else 0,
                        user_notice=True,
                    )
                )
        if progress.lost_locks:
            self._emit(
                CheckpointEvent(
                    name="flush.lock_lost",
                    error_type="checkpoint_flush_error",
                    severity="warning",
                    message="This process stood still inside a flush, or Redis took very long to answer, so the "
                    "database gave its locks to others. Nothing was written; it tries again with a smaller batch.",
                    component="flusher",
                    operation="flush",
                    outcome="retrying",
                    checkpoint_count=0,
                )
            )
        for address, change in progress.changes:
            self._emit(
                CheckpointEvent(
                    name="put.sanitized",
                    error_type="checkpoint_sanitized",
                    severity="warning",
                    message=f"{change.path}: {change.kind} replaced at the Postgres write.",
                    thread_id=address.thread_id,
                    checkpoint_ns=address.checkpoint_ns,
                    component="store",
                    operation="flush",
                    context={"changes": [{"path": change.path, "kind": change.kind}]},
                )
            )
        for letter in progress.replayed:
            self._emit(poison.replayed(letter))
        for letter in progress.dropped:
            self._emit(poison.dropped(letter))
        for thread, letter in progress.pinned.items():
            self.ledger.pin(thread, time.monotonic() + _PINNED_PAUSE)
            if self._told.get(thread) != letter.id:
                self._told[thread] = letter.id
                self._emit(poison.added(letter, self.ledger.debt(thread)))
        for thread, ids in progress.late.items():
            self._emit(
                CheckpointEvent(
                    name="put.late",
                    error_type="checkpoint_late",
                    severity="warning",
                    message="The thread was deleted while a run of it was going on; what the run still saves is "
                    "dropped.",
                    thread_id=thread,
                    checkpoint_id=ids[0],
                    component="flusher",
                    operation="flush",
                    checkpoint_count=len(ids),
                    user_notice=True,
                )
            )
        return total_lost

    def _report_loss(self, thread: str, debt: Debt, lost: Sequence[Owed]) -> None:
        if not lost:
            return
        checkpoints = [owed for owed in lost if owed.task_id is None]
        steps = sorted({owed.step for owed in checkpoints if owed.step is not None})
        which = f" (steps {', '.join(map(str, steps[:20]))})" if steps else ""
        self._emit(
            CheckpointEvent(
                name="checkpoint.lost",
                error_type="checkpoint_lost",
                severity="critical",
                message=f"Redis has lost {len(checkpoints)} acknowledged checkpoints{which} and the pending writes of "
                f"{len(lost) - len(checkpoints)} tasks before they were flushed.",
                thread_id=thread,
                run_id=debt.run_id,
                step=steps[0] if steps else None,
                checkpoint_id=checkpoints[0].checkpoint_id if checkpoints else lost[0].checkpoint_id,
                component="buffer",
                operation="flush",
                outcome="lost",
                lost_from_step=steps[0] if steps else None,
                checkpoint_count=len(checkpoints),
                context={
                    "steps": steps[:1000],
                    "checkpoint_ids": [owed.checkpoint_id for owed in checkpoints[:100]],
                    "tasks": [owed.task_id for owed in lost if owed.task_id is not None][:100],
                },
                user_notice=True,
            )
        )

    def _report_failure(self, exc: Exception, threads: set[str]) -> None:
        """Tell each affected thread once for each outage; operators get the whole error with it."""
        self.totals.failures += 1
        error = describe_error(exc)
        if isinstance(exc, BufferUnavailableError):
            message = "The buffer cannot be read; what it holds will be saved when it is back."
        elif isinstance(exc, TierUnavailableError):
            message = (
                "The database cannot be reached; the checkpoints wait in the buffer and will be saved when it is back."
            )
        else:
            message = f"Flushing failed ({error.type}); the checkpoints wait in the buffer and are tried again."
        fresh = [thread for thread in threads if thread not in self._troubled]
        for thread in fresh:
            self._troubled.add(thread)
            self._emit_failure(thread, error, message)
        if not threads and not isinstance(exc, TierUnavailableError) and self._attempt <= 1:
            self._emit_failure(None, error, message)

    def _emit_failure(self, thread: str | None, error: ErrorInfo, message: str) -> None:
        debt: Debt | None = self.ledger.debt(thread) if thread is not None else None
        self._emit(
            CheckpointEvent(
                name="flush.failed",
                error_type="checkpoint_flush_error",
                severity="critical",
                message=message,
                thread_id=thread,
                run_id=debt.run_id if debt else None,
                step=debt.first_step if debt else None,
                component="flusher",
                operation="flush",
                attempt=max(1, self._attempt),
                outcome="retrying",
                checkpoint_count=len(debt.checkpoints) if debt else 0,
                error=error,
                user_notice=thread is not None,
            )
        )

    def _report_incomplete(self, threads: list[str], report: FlushReport) -> None:
        why = "there was no time left before closing" if self._closed else "another worker holds the partition"
        for thread in threads[:100]:
            self.tell_when_saved(thread)
            debt = self.ledger.debt(thread)
            self._emit(
                CheckpointEvent(
                    name="flush.incomplete",
                    error_type="checkpoint_flush_error",
                    severity="warning",
                    message=f"Not everything could be saved yet: {why}. It is still buffered and will be saved.",
                    thread_id=thread,
                    run_id=debt.run_id if debt else None,
                    component="flusher",
                    operation="flush",
                    outcome="buffered",
                    checkpoint_count=len(debt.checkpoints) if debt else 0,
                    context={"waiting_records": report.waiting},
                    user_notice=True,
                )
            )
