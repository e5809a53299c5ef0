"""How a put gets to where it is safe: into the buffer, around it, on to Postgres, or not at all, and then it is said.

Not here: doing a step (`saver.py` has the runners) and reading (`operations.py`). Each operation is a generator
without I/O. Words: a thread is *open* once Postgres knows that the buffer may have something of it
(`store/threads.py`); a put goes *around* when it is stored in Postgres because Redis cannot take it; it is *late* when
it continues a checkpoint of a thread that was deleted meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg

from checkpointer.buffer.commands import Commands, PutReply, ScriptCall, Standing, pack_known
from checkpointer.buffer.keys import tag_of
from checkpointer.errors import (
    AcknowledgementError,
    BufferUnavailableError,
    CheckpointerError,
    CheckpointLostError,
    StoreUnavailableError,
    UnsupportedServerError,
)
from checkpointer.events import CheckpointEvent, describe_error
from checkpointer.flush.ledger import Owed
from checkpointer.flush.session import LockedElsewhereError
from checkpointer.options import ACKS
from checkpointer.records import Address, Blob, Codec, Put, PutWrites, address_of, run_id_of, saved_config
from checkpointer.steps import Flushed, Job, Pause
from checkpointer.store import reads, threads
from checkpointer.store.reads import Query
from checkpointer.store.writes import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from langchain_core.runnables import RunnableConfig

    from checkpointer.buffer.keys import KeyLayout
    from checkpointer.flush.flusher import Flusher
    from checkpointer.flush.ledger import Ledger
    from checkpointer.flush.session import Session
    from checkpointer.options import Ack, BufferOptions
    from checkpointer.sanitize import Change
    from checkpointer.steps import Step
    from checkpointer.store.threads import Opening
    from checkpointer.tiers import Tier
    from checkpointer.watermarks import WaterMarks

_KNOWN_THREADS = 10_000
# An opening that no put has used for this long may have been taken back (flush/session.py: CLOSE_AFTER).
_OPENING_SECONDS = 20.0
# For how long what a read has learned of a thread is believed without asking again: until its run's first put arrives.
_LEARNED_SECONDS = 20.0
_ATTEMPTS = 5
_CONFIRMED = ("replicated", "fsynced")
_DELTA = b'"counters_since_delta_snapshot"'


class _About:
    """What events say about a put, and its partition."""

    __slots__ = ("address", "checkpoint_id", "operation", "partition", "run_id", "step")

    def __init__(self, put: Put | PutWrites, layout: KeyLayout) -> None:
        self.address = put.address
        self.partition = layout.partition_of(put.address.thread_id)
        self.run_id = put.run_id
        if isinstance(put, Put):
            self.operation, self.checkpoint_id, self.step = "put", put.row.checkpoint_id, put.step
        else:
            self.operation, self.checkpoint_id, self.step = "put_writes", put.checkpoint_id, None

    def event(self, name: str, severity: Any, message: str, **more: Any) -> CheckpointEvent:
        return CheckpointEvent(
            name=name,
            severity=severity,
            message=message,
            thread_id=self.address.thread_id,
            run_id=self.run_id,
            checkpoint_ns=self.address.checkpoint_ns,
            checkpoint_id=self.checkpoint_id,
            step=self.step,
            operation=self.operation,
            **more,
        )


class _Learned(NamedTuple):
    """All namespaces of a thread and their heads, as Postgres had them, and when that was read."""

    heads: Sequence[tuple[str, str]]
    at: float


class Puts:
    """The puts of one saver; shared by its clones.

    Args:
        commands: Builds the script calls.
        ledger: What this process owes.
        options: The saver's settings.
        emit: Takes events.
        redis_tier: The health of Redis.
        postgres_tier: The health of Postgres.
        flusher: Has threads flushed.
        marks: How full the buffer is.
    """

    def __init__(
        self,
        commands: Commands,
        ledger: Ledger,
        options: BufferOptions,
        emit: Callable[[CheckpointEvent], None],
        redis_tier: Tier,
        postgres_tier: Tier,
        flusher: Flusher,
        marks: WaterMarks,
    ) -> None:
        self._commands = commands
        self._ledger = ledger
        self._options = options
        self._emit = emit
        self._redis_tier = redis_tier
        self._postgres_tier = postgres_tier
        self._flusher = flusher
        self._marks = marks
        self._lock = threading.Lock()
        # What cold reads learned of whole threads, for the thread's next put, and what such a put is about to bring.
        self._known: OrderedDict[str, _Learned] = OrderedDict()
        self._on_the_way: dict[str, _Learned] = {}
        # Threads that a read has opened for the puts that follow: thread -> opening, and when.
        self._openings: OrderedDict[str, tuple[Opening, float]] = OrderedDict()
        # Threads whose users were told of the outage of Redis with this number, and of late puts.
        self._told: set[str] = set()
        self._told_of = 0
        self._told_late: OrderedDict[str, None] = OrderedDict()
        self._unconfirmed_at = 0.0
        self.around = 0  # how many went around Redis

    def renew_lock(self) -> None:
        """In a forked child: whoever held the lock is not here."""
        self._lock = threading.Lock()

    # -- what reads tell -----------------------------------------------------------------------------------------

    def learn(self, thread_id: str, heads: Sequence[tuple[str, str]]) -> None:
        """Keep what a read has learned of a thread, all its namespaces and their heads, for its next put."""
        with self._lock:
            _keep(self._known, thread_id, _Learned(heads, time.monotonic()))

    def knows_empty(self, address: Address) -> bool:
        """Tell whether a read has just learned that Postgres has nothing of a namespace.

        Redis learns it from the thread's next put, which may be on its way: a run that saves in the background can
        reach a subgraph before its first put has reached Redis.
        """
        with self._lock:
            learned = self._on_the_way.get(address.thread_id) or self._known.get(address.thread_id)
        if learned is None or time.monotonic() - learned.at > _LEARNED_SECONDS:
            return False
        return all(ns != address.checkpoint_ns for ns, _ in learned.heads)

    def opened(self, thread_id: str, opening: Opening) -> None:
        """Keep the token under which a read has opened a thread, for its next put."""
        with self._lock:
            _keep(self._openings, thread_id, (opening, time.monotonic()))

    def forget(self, thread_ids: Sequence[str]) -> None:
        """Forget what reads have told of threads that are changed as a whole."""
        with self._lock:
            for thread_id in thread_ids:
                self._known.pop(thread_id, None)
                self._on_the_way.pop(thread_id, None)

    def _bring(self, thread_id: str) -> _Learned | None:
        """Take what was learned of a thread, for a put that says when it has `brought` it."""
        if thread_id not in self._known:
            return None
        with self._lock:
            learned = self._known.pop(thread_id, None)
            if learned is not None:
                self._on_the_way[thread_id] = learned
        return learned

    def _brought(self, thread_id: str, learned: _Learned) -> None:
        with self._lock:
            if self._on_the_way.get(thread_id) is learned:
                self._on_the_way.pop(thread_id, None)

    def _opening(self, thread_id: str) -> Opening | None:
        if thread_id not in self._openings:
            return None
        with self._lock:
            found = self._openings.pop(thread_id, None)
        return found[0] if found and time.monotonic() - found[1] < _OPENING_SECONDS else None

    # -- the two puts --------------------------------------------------------------------------------------------

    def put(self, put: Put, codec: Codec) -> Generator[Step, Any, RunnableConfig]:
        """Store a checkpoint: in the buffer, or in Postgres if the buffer cannot take it."""
        about = _About(put, self._commands.layout)
        address = put.address
        saved = saved_config(address, put.row.checkpoint_id)
        self._begin(about, put)
        level = put.ack or self._options.ack
        is_delta = _DELTA in put.row.metadata
        learned = self._bring(address.thread_id)
        known = b"" if learned is None else pack_known(learned.heads)
        try:
            if self._is_hindered(about):
                yield from self._make_way(about)
            standing, whole = self._standing(about)
            call = self._commands.put(put, standing, known, self._all_blobs(put, codec) if whole else put.blobs)
            reply, answer = self._read(level, (yield self._confirmed(level, call)))
            if reply.refused is not None:
                reply, answer = yield from self._put_again(
                    about,
                    lambda standing, whole: self._commands.put(
                        put, standing, known, self._all_blobs(put, codec) if whole else put.blobs
                    ),
                    put.origin,
                    level,
                    is_delta,
                    (standing, whole, reply),
                )
        except BufferUnavailableError as exc:
            if is_delta and self._ledger.debt(address.thread_id):
                raise self._lost(
                    about,
                    exc,
                    "Redis cannot be reached, and this thread has a DeltaChannel whose latest writes are only there, "
                    "so the checkpoint cannot go straight to Postgres. Resume the thread when Redis is back.",
                ) from exc
            # All values, not only the changed ones: the unchanged may be in the buffer only.
            batch = Batch()
            for blob in self._all_blobs(put, codec):
                batch.add_blob(address, blob)
            batch.add_checkpoint(address, put.row)
            yield from self._go_around(about, batch, put.origin, exc)
            return saved
        finally:
            if learned is not None:
                self._brought(address.thread_id, learned)
        if reply.refused is not None:
            return saved  # late
        owed = Owed(reply.sequence, address.checkpoint_ns, put.row.checkpoint_id, None, put.step)
        self._note(about, reply, len(put.blobs) + 1, owed)
        if reply.lacks:
            blobs = codec.encode_blobs(put, reply.lacks)
            # The put is acknowledged; without the unchanged channels, reads ask Postgres for them.
            with contextlib.suppress(BufferUnavailableError):
                yield self._commands.fill(address, put.row.checkpoint_id, blobs)
        if level != "buffered" or self._marks.is_high:
            yield from self._make_sure(about, level, answer, reply)
        return saved

    @staticmethod
    def _all_blobs(put: Put, codec: Codec) -> list[Blob]:
        new = {blob.ref for blob in put.blobs}
        missing = [i for i, ref in enumerate(put.row.refs, 1) if ref not in new]
        return [*put.blobs, *codec.encode_blobs(put, missing)]

    def put_writes(self, put: PutWrites) -> Generator[Step, Any, None]:
        """Store pending writes: in the buffer, or in Postgres if the buffer cannot take them."""
        if not put.writes:
            return
        about = _About(put, self._commands.layout)
        address = put.address
        self._begin(about, put)
        level = put.ack or self._options.ack
        if put.writes[0].overwrite:
            level = max(level, self._options.control_ack, key=ACKS.index)
        origin = address.checkpoint_ns, put.checkpoint_id
        try:
            if self._is_hindered(about):
                yield from self._make_way(about)
            standing, whole = self._standing(about)
            call = self._commands.put_writes(put, standing)
            reply, answer = self._read(level, (yield self._confirmed(level, call)))
            if reply.refused is not None:
                reply, answer = yield from self._put_again(
                    about,
                    lambda standing, _: self._commands.put_writes(put, standing),
                    origin,
                    level,
                    False,
                    (standing, whole, reply),
                )
        except BufferUnavailableError as exc:
            batch = Batch()
            for write in put.writes:
                batch.add_write(address, put.checkpoint_id, write)
            yield from self._go_around(about, batch, origin, exc)
            return
        if reply.refused is not None:
            return  # late
        owed = Owed(reply.sequence, address.checkpoint_ns, put.checkpoint_id, put.writes[0].task_id)
        self._note(about, reply, len(put.writes), owed)
        if level != "buffered" or self._marks.is_high:
            yield from self._make_sure(about, level, answer, reply)

    # -- into the buffer -----------------------------------------------------------------------------------------

    def _begin(self, about: _About, put: Put | PutWrites) -> None:
        self._flusher.start()
        self._ledger.begin(about.address.thread_id)
        if put.changes:
            self._report_changes(about, put.changes)

    def _is_hindered(self, about: _About) -> bool:
        """Tell whether a put has to wait for something before it is sent."""
        return self._marks.is_high or self._ledger.is_passed(about.address.thread_id)

    def _make_way(self, about: _About) -> Generator[Step, Any, None]:
        """Wait for what has to come before a put.

        Raises:
            BufferUnavailableError: Redis cannot take it.
        """
        thread = about.address.thread_id
        if self._marks.is_high:
            yield from self._hold_back()
        if self._ledger.is_passed(thread) and not self._postgres_tier.is_down:
            self._redis_tier.check(tag_of(self._commands.layout.threads(about.partition)))
            # What it has is flushed first, so that the new comes after it. If Redis fails in that, the new goes around
            # too, since in the buffer it would count as older; if something else fails, it counts as that.
            try:
                yield Flushed(thread, 0)
            except BufferUnavailableError:
                raise
            except CheckpointerError:
                pass

    def _standing(self, about: _About) -> tuple[Standing, bool]:
        """Return what is known of a thread, and whether a put has to bring all values."""
        thread = about.address.thread_id
        opening = self._opening(thread)
        standing = Standing(None, self._ledger.expected(thread), self._ledger.floor(about.partition))
        return (standing, False) if opening is None else (_opened(standing, opening), opening.existed)

    def _confirmed(self, level: Ack, call: ScriptCall) -> ScriptCall:
        return call._replace(confirm=self._confirmation(level)) if level in _CONFIRMED else call

    def _read(self, level: Ack, raw: Any) -> tuple[PutReply, Any]:
        """Read what Redis says to a put, and to the question whether it is safe there."""
        raw, answer = raw if level in _CONFIRMED else (raw, None)
        return self._commands.read_put(raw), answer

    def _put_again(
        self,
        about: _About,
        call: Callable[[Standing, bool], ScriptCall],
        origin: tuple[str, str] | None,
        level: Ack,
        is_delta: bool,
        sent: tuple[Standing, bool, PutReply],
    ) -> Generator[Step, Any, tuple[PutReply, Any]]:
        """Put what was refused again, as `call` builds it, and return the replies; one that is late stays refused.

        Raises:
            BufferUnavailableError: Redis cannot take it.
        """
        thread = about.address.thread_id
        standing, whole, reply = sent
        for _ in range(_ATTEMPTS):
            if reply.refused == "closed":
                standing, whole = yield from self._open(thread, about.partition, standing)
            elif reply.refused == "lost":
                self._ledger.suspect(thread)
                standing, whole = standing._replace(expected=0), True
                yield from self._look_for_losses(about, is_delta)
            elif (yield from self._is_late(about, origin)):
                return reply, None
            else:
                standing = standing._replace(force=True)
            reply, answer = self._read(level, (yield self._confirmed(level, call(standing, whole))))
            if reply.refused is None:
                return reply, answer
        raise BufferUnavailableError(
            f"Redis refused a {about.operation} of thread {thread!r} several times, each time because the thread's "
            "state had changed meanwhile."
        )

    def _hold_back(self) -> Generator[Step, Any, None]:
        if (pause := self._marks.pause()) and not self._postgres_tier.is_down:
            self._flusher.wake_all()
            yield Pause(pause)

    def _open(self, thread: str, partition: int, standing: Standing) -> Generator[Step, Any, tuple[Standing, bool]]:
        try:
            query = Query(*threads.opening(self._options.prefix, thread, partition), short=True)
            opening = threads.read_opening((yield query))
        except StoreUnavailableError:
            # Postgres cannot be told; the buffer carries on. Whether it has forgotten something is open.
            return standing._replace(open=0), True
        standing = _opened(standing, opening)
        if opening.existed:
            return standing, True
        # Closed in order: all that was put before is in Postgres.
        return standing._replace(expected=0), False

    def _look_for_losses(self, about: _About, is_delta: bool) -> Generator[Step, Any, None]:
        thread = about.address.thread_id
        try:
            lost = yield Job(lambda session: self._flusher.audit(session, [thread]))
        except CheckpointerError as exc:
            if is_delta:
                raise self._lost(
                    about,
                    exc,
                    "Redis has forgotten records of this thread, whose DeltaChannel needs them, and Postgres cannot be "
                    "asked for them. Resume the thread when Postgres is back.",
                ) from exc
            return  # the flusher looks again
        if lost and is_delta:
            cause = CheckpointLostError(f"{lost} acknowledged records of the thread are lost")
            raise self._lost(
                about,
                cause,
                "Redis has lost records of this thread that its DeltaChannel needs, so the checkpoint would be wrong. "
                "Resume the thread from its latest checkpoint.",
            ) from cause

    def _is_late(self, about: _About, origin: tuple[str, str] | None) -> Generator[Step, Any, bool]:
        address = about.address
        # What is there already is put again, whatever it is said to continue.
        own = (address.checkpoint_ns, about.checkpoint_id) if about.operation == "put" else None
        for ns, checkpoint_id in filter(None, (origin, own)):
            try:
                if (yield reads.exists(Address(address.thread_id, ns), checkpoint_id))[0]["found"]:
                    return False
            except StoreUnavailableError:
                return False  # the flush looks again
        with self._lock:
            told = address.thread_id in self._told_late
            _keep(self._told_late, address.thread_id, None)
        if not told:
            self._emit(late_event(about))
        return True

    # -- acknowledging -------------------------------------------------------------------------------------------

    def _confirmation(self, level: Ack) -> tuple[str | int, ...]:
        milliseconds = max(1, int(self._options.redis_timeout * 500))
        if level == "replicated":
            return "WAIT", self._options.replicas, milliseconds
        return ("WAITAOF", 1, 0, milliseconds) if level == "fsynced" else ()

    def _is_confirmed(self, level: Ack, answer: Any) -> bool:
        if level in ("buffered", "flushed"):
            return level == "buffered"
        if isinstance(answer, Exception):
            raise UnsupportedServerError(
                f"This Redis cannot acknowledge with ack={level!r} ({answer}): "
                + (
                    "it needs Redis 7.2 or Valkey with appendonly yes."
                    if level == "fsynced"
                    else "it needs a server with replicas."
                )
                + " The put is in the buffer."
            ) from answer
        if level == "replicated":
            return int(answer) >= self._options.replicas
        return int(answer[0]) >= 1

    def _make_sure(self, about: _About, level: Ack, answer: Any, reply: PutReply) -> Generator[Step, Any, None]:
        """Bring a buffered put to the level asked for.

        Raises:
            AcknowledgementError: That failed.
            UnsupportedServerError: Redis cannot tell.
        """
        thread = about.address.thread_id
        if self._is_confirmed(level, answer):
            if self._marks.goes_through() and not self._postgres_tier.is_down:
                # If that fails, it is still buffered, which is what was asked for.
                with contextlib.suppress(CheckpointerError):
                    yield Flushed(thread, reply.sequence)
            return
        if level != "flushed" and time.monotonic() - self._unconfirmed_at > 60:
            self._unconfirmed_at = time.monotonic()
            self._emit(
                about.event(
                    "put.unconfirmed",
                    "warning",
                    f"Redis did not confirm a put as {level} in time; it is flushed to Postgres instead.",
                    error_type="checkpoint_buffer_error",
                    outcome="buffered",
                )
            )
        try:
            yield Flushed(thread, reply.sequence)
        except CheckpointerError as exc:
            self._flusher.tell_when_saved(thread)
            self._emit(
                about.event(
                    "put.unacknowledged",
                    "error",
                    f"A put could not be made as safe as asked for ({level}); it waits in the buffer.",
                    error_type="checkpoint_buffer_error",
                    outcome="buffered",
                    checkpoint_count=int(about.operation == "put"),
                    error=describe_error(exc),
                    user_notice=True,
                )
            )
            raise AcknowledgementError(
                f"The {about.operation} is in the buffer, but could not be acknowledged as {level!r}: {exc} It will be "
                "flushed when that is possible; putting it again is safe."
            ) from exc

    def _note(self, about: _About, reply: PutReply, records: int, owed: Owed) -> None:
        thread, partition = about.address.thread_id, about.partition
        self._marks.note(partition, reply.held_bytes, reply.age)
        count = self._ledger.note(thread, partition, records, owed, reply.token, about.run_id)
        if count >= self._options.flush_size and "size" in self._options.triggers:
            self._flusher.wake_all()

    # -- around the buffer ---------------------------------------------------------------------------------------

    def _go_around(
        self, about: _About, batch: Batch, origin: tuple[str, str] | None, cause: BufferUnavailableError
    ) -> Generator[Step, Any, None]:
        thread = about.address.thread_id
        wait = self._options.postgres_timeout
        owes = self._ledger.debt(thread) is not None
        name = (about.address.checkpoint_ns, about.checkpoint_id) if about.operation == "put" else None

        def write(session: Session) -> bool:
            self._ledger.went_around(thread)  # here, where no flush of the thread can take it back meanwhile
            return session.write_around(batch, thread, name, origin, owes, wait)

        try:
            late = yield Job(write)
        except (StoreUnavailableError, LockedElsewhereError, psycopg.Error) as exc:
            # A record that Postgres refuses would become a dead letter, but for that the buffer has to hold its thread.
            step = "" if about.step is None else f" of step {about.step}"
            raise self._lost(
                about,
                exc,
                f"Neither Redis nor Postgres took the {about.operation}{step}; what the run does from here on is not "
                "saved. Resume the thread when the servers are back.",
            ) from exc
        if late:
            self._emit(late_event(about))
            return
        with self._lock:
            self.around += 1
            if self._told_of != self._redis_tier.outages:
                self._told_of = self._redis_tier.outages
                self._told.clear()
            if thread in self._told:
                return
            self._told.add(thread)
        self._emit(
            about.event(
                "put.around",
                "warning",
                "The buffer cannot be reached; checkpoints of this thread go straight to the database.",
                error_type="checkpoint_buffer_error",
                outcome="recovered",
                checkpoint_count=len(batch.checkpoints),
                error=describe_error(cause.__cause__ or cause),
                user_notice=True,
            )
        )

    def _lost(self, about: _About, cause: BaseException, message: str) -> CheckpointLostError:
        """Report that a put was not taken, and return the error for it."""
        self._emit(
            about.event(
                "put.failed",
                "critical",
                "Neither Redis nor Postgres could take a checkpoint; the run is not saved from "
                + ("here" if about.step is None else f"step {about.step}")
                + " on.",
                error_type="checkpoint_lost",
                outcome="lost",
                lost_from_step=about.step,
                checkpoint_count=int(about.operation == "put"),
                error=describe_error(cause),
                user_notice=True,
            )
        )
        return CheckpointLostError(message)

    def _report_changes(self, about: _About, changes: Sequence[Change]) -> None:
        shown = ", ".join(f"{change.path} ({change.kind})" for change in changes[:5])
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        self._emit(
            about.event(
                "put.sanitized",
                "warning",
                f"Values that Postgres cannot hold were replaced: {shown}{more}.",
                error_type="checkpoint_sanitized",
                context={
                    "changes": [{"path": c.path, "kind": c.kind} for c in changes[:100]],
                    "change_count": len(changes),
                },
            )
        )


def _opened(standing: Standing, opening: Opening) -> Standing:
    # Redis may have been emptied since this process last heard of a number.
    return standing._replace(open=opening.token, floor=max(standing.floor, opening.flushed))


def _keep(kept: OrderedDict[str, Any], key: str, value: Any) -> None:
    kept[key] = value
    while len(kept) > _KNOWN_THREADS:
        kept.popitem(last=False)


def late_event(about: _About) -> CheckpointEvent:
    """Return the event of a put that continues a deleted life of its thread."""
    return about.event(
        "put.late",
        "warning",
        "The thread was deleted while a run of it was going on; what the run still saves is dropped.",
        error_type="checkpoint_late",
        checkpoint_count=int(about.operation == "put"),
        user_notice=True,
    )


def refused_event(
    operation: str, config: RunnableConfig, metadata: Mapping[str, Any], cause: CheckpointerError
) -> CheckpointEvent:
    """Return the event of a put that is refused for one of its values.

    Args:
        operation: `put` or `put_writes`.
        config: Has a usable thread and namespace.
        metadata: Those of a checkpoint.
        cause: Names the place.
    """
    step = metadata.get("step")
    step = step if isinstance(step, int) else None
    address = address_of(config, need_ns=True)
    return CheckpointEvent(
        name="put.refused",
        severity="critical",
        message="A value cannot be stored, so the run is not saved from "
        + ("here" if step is None else f"step {step}")
        + f" on: {cause}",
        error_type="checkpoint_refused",
        thread_id=address.thread_id,
        run_id=run_id_of(config),
        checkpoint_ns=address.checkpoint_ns,
        step=step,
        operation=operation,
        outcome="lost",
        lost_from_step=step,
        checkpoint_count=int(operation == "put"),
        error=describe_error(cause),
        user_notice=True,
    )
