"""What the saver does, step by step, without I/O: an operation is a generator that yields steps and receives replies.

Not here: doing a step (`saver.py` has the two runners, synchronous and asynchronous, so that they cannot drift apart),
what can be a step (`steps.py`), putting (`puts.py`). A step that fails is raised inside the generator, which decides
what that means.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from langgraph.checkpoint.base import get_checkpoint_id
from psycopg.types.json import Jsonb

from checkpointer import checks
from checkpointer.errors import (
    BufferUnavailableError,
    FlushIncompleteError,
    StoreUnavailableError,
    TierUnavailableError,
)
from checkpointer.events import CheckpointEvent, describe_error
from checkpointer.flush.barriers import flush_first
from checkpointer.flush.session import check_partitions
from checkpointer.merge import (
    Snapshot,
    Verdict,
    add_sends,
    buffer_wins,
    complete,
    from_buffer,
    from_row,
    merge_writes,
    overlay,
    stands,
    to_tuple,
)
from checkpointer.records import (
    Address,
    Codec,
    Put,
    PutWrites,
    address_of,
    checked_text,
    thread_text,
)
from checkpointer.run_streams import RUNTIME
from checkpointer.sanitize import dump_json, load_json
from checkpointer.steps import Both, Flushed, Job, ServerInfo
from checkpointer.store import delta, reads, threads
from checkpointer.store.clients import not_set_up
from checkpointer.store.reads import Query

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import CheckpointTuple, DeltaChannelHistory

    from checkpointer.buffer.commands import BufferRead, Commands
    from checkpointer.flush.flusher import Flusher
    from checkpointer.flush.ledger import Ledger
    from checkpointer.options import BufferOptions
    from checkpointer.puts import Puts
    from checkpointer.records import Write
    from checkpointer.steps import Step

T = TypeVar("T")

_TELL_AGAIN_SECONDS = 60.0
_TOLD_THREADS = 10_000


@dataclass(slots=True)
class _Ahead:
    """A question to Postgres that goes out together with the one to Redis, or before it, and its answer.

    Records move from Redis to Postgres, so what Postgres says may be older than what Redis says: it counts only if
    Redis shows no sign of a flush in between. What another writer puts meanwhile may be missed, as by any read that
    begins before that put has returned.

    Attributes:
        query: The question.
        is_whole: It asks for the latest checkpoint itself, not only for its id.
        asked_at: When; 0 if not yet.
        rows: The answer, or the error; None if it does not count.
        is_used: Redis has been asked since.
    """

    query: Query
    is_whole: bool
    asked_at: float = 0.0
    rows: Sequence[Mapping[str, Any]] | StoreUnavailableError | None = None
    is_used: bool = False

    def verdict(self, found: BufferRead) -> Verdict | None:
        """Return what Postgres says about a head of Redis, or None if it has to be asked.

        Raises:
            StoreUnavailableError: It cannot be reached.
        """
        if isinstance(self.rows, StoreUnavailableError):
            raise self.rows
        if self.rows is None:
            return None
        if not self.is_whole:
            return reads.read_verdict(self.rows)
        stored, _ = reads.read_latest(self.rows)
        if stored is None or stored.checkpoint_id != found.head:
            return None
        return Verdict(stored.checkpoint_id, stored.parent_id, len(stored.writes), 0, bool(self.rows[0]["replay"]))

    def latest(self, found: BufferRead, clean_ttl: float) -> Sequence[Mapping[str, Any]] | None:
        """Return the rows with the latest checkpoint, or None if Postgres has to be asked after Redis.

        Raises:
            StoreUnavailableError: It cannot be reached.
        """
        if isinstance(self.rows, StoreUnavailableError):
            raise self.rows
        # Had the namespace been flushed in between, Redis would have kept its head for a while.
        is_unknown = found.head is None and not found.writes
        if self.is_whole and is_unknown and time.monotonic() - self.asked_at < clean_ttl:
            return self.rows
        return None


class Operations:
    """The operations of one saver; shared by its clones.

    Args:
        commands: Builds the script calls.
        ledger: What this process owes.
        options: The saver's settings.
        flusher: Has threads flushed.
        puts: Learns from reads what the puts that follow can use.
        emit: Takes events.
    """

    def __init__(
        self,
        commands: Commands,
        ledger: Ledger,
        options: BufferOptions,
        flusher: Flusher,
        puts: Puts,
        emit: Callable[[CheckpointEvent], None],
    ) -> None:
        self._commands = commands
        self._ledger = ledger
        self._options = options
        self._flusher = flusher
        self._puts = puts
        self._emit = emit
        self._store_checked = False
        self._buffer_checked = False
        self._is_ready = False
        self._unsafe: set[str] = set()
        # Threads of which was told that a read could not be verified, and when to tell of it again.
        self._tell_again: dict[str | None, float] = {}

    # -- the door ------------------------------------------------------------------------------------------------

    def ready(self) -> Generator[Step, Any, None]:
        """Check both servers, once; a server that is away is checked another time.

        Raises:
            NotSetUpError: The tables are missing.
            UnsupportedServerError: A server is too old, or cannot keep the guarantees.
            ConfigurationError: The application has another number of partitions, or the schema is not in effect.
        """
        if self._is_ready:
            return
        clocks = checks.Clocks()
        if not self._store_checked:
            with contextlib.suppress(StoreUnavailableError):
                yield from self._check_store(clocks, starting=False)
        if not self._buffer_checked:
            with contextlib.suppress(BufferUnavailableError):
                yield from self._check_buffer(clocks, starting=False)
        self._is_ready = self._store_checked and self._buffer_checked
        self._judge(checks.clock_findings(clocks), starting=False)

    def register(self) -> Generator[Step, Any, None]:
        """Check both servers, and note in Postgres into how many partitions the threads are divided.

        Raises:
            ConfigurationError: The application has another number of partitions, or the schema is not in effect.
            UnsupportedServerError: A server is too old, or cannot keep the guarantees.
            TierUnavailableError: A server cannot be reached.
        """
        clocks = checks.Clocks()
        yield from self._check_store(clocks, starting=True)
        yield Job(lambda session: session.connection())
        yield from self._check_buffer(clocks, starting=True)
        self._judge(checks.clock_findings(clocks), starting=True)

    def _check_store(self, clocks: checks.Clocks, *, starting: bool) -> Generator[Step, Any, None]:
        asked = time.time()
        row = (yield reads.ready())[0]
        clocks.note("Postgres", row["clock"], asked, time.time())
        schema = self._options.schema
        self._judge(checks.postgres_findings(row, schema=schema), starting=starting)
        if not row["tables"] or (schema is not None and row["tables_in"] != [schema]):
            raise not_set_up(LookupError("the checkpoint tables"))
        for stored in (yield reads.partitions(self._options.prefix)):
            check_partitions(self._options, stored["partitions"])
        for row in (yield Query(*threads.floors(self._options.prefix))):
            self._ledger.saw("", 0, row["partition"], row["sequence"])
        self._store_checked = True

    def _check_buffer(self, clocks: checks.Clocks, *, starting: bool) -> Generator[Step, Any, None]:
        asked = time.time()
        facts: checks.BufferFacts = yield ServerInfo()
        if len(facts.nodes) == 1 and "server_time_usec" in facts.nodes[0]:
            clocks.note("Redis", facts.nodes[0]["server_time_usec"] / 1e6, asked, time.time())
        # What may pass is left to be checked another time.
        self._buffer_checked = self._judge(checks.redis_findings(facts), starting=starting)
        if starting:
            levels = {self._options.ack, self._options.control_ack}
            self._judge(checks.acknowledgement_findings(facts, levels, self._options.replicas), starting=starting)

    def _judge(self, findings: Sequence[checks.Finding], *, starting: bool) -> bool:
        """Refuse a server, or report once what is not as it should be.

        Args:
            findings: What was found.
            starting: Refuse also what may pass; a saver in use rather goes on with the other server.

        Returns:
            Whether there was no error.
        """
        fine = True
        for finding in findings:
            if finding.level == "error":
                if starting or finding.code not in checks.PASSING:
                    raise checks.as_error(finding)
                fine = False
            if finding.level != "ok" and finding.code not in self._unsafe:
                self._unsafe.add(finding.code)
                self._emit(_unsafe(finding))
        return fine

    # -- get_tuple -----------------------------------------------------------------------------------------------

    def put(self, put: Put, codec: Codec) -> Generator[Step, Any, RunnableConfig]:
        """See `Puts.put`."""
        steps = self._puts.put(put, codec)
        return steps if self._is_ready else self._when_ready(steps)

    def put_writes(self, put: PutWrites) -> Generator[Step, Any, None]:
        """See `Puts.put_writes`."""
        steps = self._puts.put_writes(put)
        return steps if self._is_ready or not put.writes else self._when_ready(steps)

    def _when_ready(self, steps: Generator[Step, Any, T]) -> Generator[Step, Any, T]:
        yield from self.ready()
        return (yield from steps)

    def get_tuple(self, config: RunnableConfig, saver: Any) -> Generator[Step, Any, CheckpointTuple | None]:
        """Read one checkpoint, the latest if the config names none."""
        address = address_of(config)
        checkpoint_id = get_checkpoint_id(config) or None
        yield from self.ready()
        # A run that reads is about to put: Postgres is told in the same breath.
        snapshot = yield from self._snapshot(address, checkpoint_id, opening=RUNTIME in config["configurable"])
        if snapshot is None:
            return None
        if snapshot.needs_sends:
            yield from self._add_sends(snapshot, saver)
        return to_tuple(snapshot, saver.serde)

    def _snapshot(
        self, address: Address, checkpoint_id: str | None, *, opening: bool
    ) -> Generator[Step, Any, Snapshot | None]:
        prefix, partition = self._options.prefix, self._commands.layout.partition_of(address.thread_id)
        ahead = None
        if checkpoint_id is None and self._options.verify_reads:
            if self._is_known(address.thread_id):
                ahead = self._ahead(address, opening=opening)
            else:
                ahead, stored = yield from self._ask_store_first(address, opening=opening)
                if ahead is None:
                    return stored
                opening = False
        try:
            found = yield from self._buffered(address, checkpoint_id, ahead=ahead)
            if checkpoint_id is None and (found.complete or (found.knows_all and found.head is None)):
                passed = self._ledger.is_passed(address.thread_id)
                is_old = passed or found.is_stale or found.last < found.replay
                if not self._options.verify_reads and not is_old:
                    return from_buffer(address, found, None)
                opening = opening and not found.open
                try:
                    verdict = None if ahead is None or opening else ahead.verdict(found)
                    if verdict is None:
                        rows = yield reads.verify(prefix, address, opening_in=partition if opening else None)
                        verdict = reads.read_verdict(rows)
                except StoreUnavailableError as exc:
                    self._require_buffer_alone(address, found, exc)
                    return from_buffer(address, found, None)
                if opening:
                    self._note_opening(address.thread_id, rows)
                    opening = False
                if not verdict.replay and stands(found, verdict):
                    return from_buffer(address, found, verdict)
                # Something went around Redis. Anew, and Redis first: records move from there to Postgres.
                if verdict.replay:
                    yield from self._flush_what_is_older(address)
                ahead = None
                found = yield from self._buffered(address, None, full=True)
        except BufferUnavailableError as exc:
            return (yield from self._snapshot_without_buffer(address, checkpoint_id, exc))
        return (yield from self._merged(address, checkpoint_id, found, opening=opening, ahead=ahead))

    def _is_known(self, thread_id: str) -> bool:
        """Tell whether Redis has something of a thread, as far as this process knows."""
        ledger = self._ledger
        return bool(ledger.expected(thread_id)) or ledger.debt(thread_id) is not None or ledger.is_passed(thread_id)

    def _ahead(self, address: Address, *, opening: bool) -> _Ahead | None:
        """Return what to ask Postgres at the same time as Redis, which is believed to have the latest checkpoint."""
        # To be opened, a thread has to be asked for in Redis first.
        if opening and self._ledger.debt(address.thread_id) is None:
            return None
        return _Ahead(reads.verify(self._options.prefix, address), is_whole=False)

    def _ask_store_first(
        self, address: Address, *, opening: bool
    ) -> Generator[Step, Any, tuple[_Ahead | None, Snapshot | None]]:
        """Ask Postgres before Redis: of a thread that is not open in the buffer it has all.

        Returns:
            What it says, for the question to Redis; or None, and the latest checkpoint, if there is no such question.
        """
        thread = address.thread_id
        partition = self._commands.layout.partition_of(thread) if opening else None
        query = reads.latest(self._options.prefix, address, opening_in=partition)
        ahead = _Ahead(query, is_whole=True, asked_at=time.monotonic())
        try:
            ahead.rows = rows = yield query
        except StoreUnavailableError as exc:
            ahead.rows = exc
            return ahead, None
        if opening:
            self._note_opening(thread, rows)
        if not reads.is_whole(rows):
            return ahead, None
        stored, heads = reads.read_latest(rows)
        if heads is not None:
            self._puts.learn(thread, heads)
        return None, stored

    def _note_opening(self, thread_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if (opening := threads.read_opening_if_closed(rows)) is not None:
            self._puts.opened(thread_id, opening)

    def _buffered(
        self, address: Address, checkpoint_id: str | None, *, full: bool = False, ahead: _Ahead | None = None
    ) -> Generator[Step, Any, BufferRead]:
        """Read Redis; if it has forgotten what this process has put there, find out what is lost, and say so.

        What is asked of Postgres at the same time comes into `ahead`.
        """
        thread = address.thread_id
        partition = self._commands.layout.partition_of(thread)

        def read() -> Generator[Step, Any, tuple[BufferRead, int, int]]:
            # Noted before the question: the answer need not know of the puts that go on meanwhile.
            expected, floor = self._ledger.expected(thread), self._ledger.floor(partition)
            call = self._commands.read(address, checkpoint_id, full=full)
            if ahead is None:
                reply = yield call
            elif ahead.asked_at:
                reply = yield call
                if ahead.is_used:
                    ahead.rows = None  # from before what has happened since
            else:
                ahead.asked_at = time.monotonic()
                reply, ahead.rows = yield Both(call, ahead.query)
            if ahead is not None:
                ahead.is_used = True
            return self._commands.read_read(checkpoint_id, reply), expected, floor

        found, expected, floor = yield from read()
        if found.last < expected:
            self._ledger.suspect(thread)
            if self._ledger.is_suspect(thread):
                yield Job(lambda session: self._flusher.audit(session, [thread]))
                found, _, floor = yield from read()
        if found.sequence < floor:
            # Redis is older than it was. What it has of the thread is flushed, without replacing anything.
            yield from self._flush_what_is_older(address)
            found, _, floor = yield from read()
            found.is_stale = found.sequence < floor
        self._ledger.saw(thread, found.last, partition, found.sequence)
        return found

    def _flush_what_is_older(self, address: Address) -> Generator[Step, Any, None]:
        """Flush a thread of which Postgres has something newer than Redis; what is flushed replaces nothing."""
        with contextlib.suppress(FlushIncompleteError, StoreUnavailableError):
            yield Flushed(address.thread_id, 0)

    def _merged(
        self,
        address: Address,
        checkpoint_id: str | None,
        found: BufferRead,
        *,
        opening: bool,
        ahead: _Ahead | None,
    ) -> Generator[Step, Any, Snapshot | None]:
        """Read Postgres too, and merge."""
        prefix, partition = self._options.prefix, self._commands.layout.partition_of(address.thread_id)
        try:
            if checkpoint_id is None:
                opening = opening and not found.open
                rows = None if ahead is None or opening else ahead.latest(found, self._options.clean_ttl)
                if rows is None:
                    rows = yield reads.latest(prefix, address, opening_in=partition if opening else None)
                if opening:
                    self._note_opening(address.thread_id, rows)
                stored, heads = reads.read_latest(rows)
                if heads is not None and not found.knows_all:
                    self._puts.learn(address.thread_id, heads)
            else:
                stored = reads.read_one((yield reads.one(address, checkpoint_id)))
            if not buffer_wins(found, stored):
                return overlay(stored, found) if stored is not None else None
            snapshot = from_buffer(address, found, None)
            if snapshot is None or found.row is None:
                raise AssertionError("buffer_wins() holds only with a row")
            if stored is not None and stored.checkpoint_id == snapshot.checkpoint_id:
                snapshot.parent_id = stored.parent_id
                blobs = [blob for channel, blob in stored.blobs.items() if channel not in snapshot.blobs]
                return complete(snapshot, blobs, stored.writes, found)
            have = {blob.ref for blob in found.blobs}
            refs = [ref for ref in found.row.refs if ref not in have]
            rest = reads.read_parts((yield reads.parts(address, snapshot.checkpoint_id, refs)))
            return complete(snapshot, *rest, found)
        except StoreUnavailableError as exc:
            is_empty = False
            if checkpoint_id is None and not (found.complete or found.knows_all):
                # A put of this process may know more of the thread than Redis did: asked first, it may arrive between.
                is_empty = self._puts.knows_empty(address)
                found = yield from self._buffered(address, None)
                is_empty = found.head is None and (is_empty or found.knows_all)
            is_all = is_empty or (found.complete and checkpoint_id in (None, found.head))
            self._require_buffer_alone(address, found, exc, is_all=is_all)
            return from_buffer(address, found, None)

    def _require_buffer_alone(
        self, address: Address, found: BufferRead, cause: StoreUnavailableError, *, is_all: bool = True
    ) -> None:
        """Check that Redis alone may answer while Postgres is away: it has all, and nothing went around it."""
        if not is_all or found.is_stale or self._ledger.is_passed(address.thread_id):
            if self._options.on_unverifiable == "serve":
                self._tell_unverified(address.thread_id, cause, "Postgres", "Redis")
                return
            raise StoreUnavailableError(
                f"Postgres cannot be reached, and Redis does not hold all of thread {address.thread_id!r}. Try again "
                "when Postgres is back, or set on_unverifiable='serve' to read what Redis has."
            ) from cause

    def _snapshot_without_buffer(
        self, address: Address, checkpoint_id: str | None, cause: BufferUnavailableError
    ) -> Generator[Step, Any, Snapshot | None]:
        yield from self._require_store_alone(address.thread_id, address.checkpoint_ns, cause)
        if checkpoint_id is None:
            return reads.read_latest((yield reads.latest(self._options.prefix, address)))[0]
        return reads.read_one((yield reads.one(address, checkpoint_id)))

    def _require_store_alone(
        self, thread_id: str | None, ns: str, cause: BufferUnavailableError
    ) -> Generator[Step, Any, None]:
        """Check that Postgres alone may answer while Redis is away: for a thread, or for all of them.

        It may for threads that are not open, and for the namespace of a subgraph call (it ends in its task's id) of
        a thread that this process is working on, if nothing of it is buffered: nobody else has written there.
        """
        if thread_id is None:
            mine = bool(self._ledger.records)
        else:
            debt = self._ledger.debt(thread_id)
            mine = debt is not None
            if (
                ":" in ns.rpartition("|")[2]
                and self._ledger.works_on(thread_id)
                and (debt is None or ns not in debt.namespaces)
            ):
                return
        if not mine and not (yield Query(*threads.is_open(self._options.prefix, thread_id)))[0]["open"]:
            return
        if self._options.on_unverifiable == "serve":
            self._tell_unverified(thread_id, cause, "Redis", "Postgres")
            return
        whose = "threads" if thread_id is None else f"thread {thread_id!r}"
        raise BufferUnavailableError(
            f"Redis cannot be reached, and it may hold checkpoints of {whose} that Postgres does not have yet. Try "
            "again when Redis is back, set on_unverifiable='serve' to read what Postgres has, or, if this Redis is "
            "gone for good, run `checkpointer buffer abandon`."
        ) from cause

    def _tell_unverified(self, thread_id: str | None, cause: TierUnavailableError, away: str, answers: str) -> None:
        """Tell that a read was served although it may be an old state; of each thread once a minute."""
        now = time.monotonic()
        if now < self._tell_again.get(thread_id, 0.0):
            return
        if len(self._tell_again) >= _TOLD_THREADS:
            self._tell_again.clear()  # so some are told sooner
        self._tell_again[thread_id] = now + _TELL_AGAIN_SECONDS
        self._emit(
            CheckpointEvent(
                name="read.unverified",
                error_type="checkpoint_read_unverified",
                severity="warning",
                message=f"{away} cannot be reached; a read was answered from what {answers} has, which may not be the "
                "latest.",
                thread_id=thread_id,
                operation="get_tuple" if thread_id is not None else "list",
                error=describe_error(cause.__cause__ or cause),
                user_notice=thread_id is not None,
            )
        )

    def _add_sends(self, snapshot: Snapshot, saver: Any) -> Generator[Step, Any, None]:
        parent = snapshot.parent_id or ""
        address = snapshot.address
        buffered: Sequence[tuple[Write, bool]] = ()
        try:
            reply = yield self._commands.read(address, parent)
            buffered = self._commands.read_read(parent, reply).writes_of(parent)
        except BufferUnavailableError as exc:
            yield from self._require_store_alone(address.thread_id, address.checkpoint_ns, exc)
        stored = reads.read_sends((yield reads.sends(address.thread_id, [parent])))
        writes = merge_writes(stored.get(parent, ()), buffered)
        add_sends(snapshot, writes, saver.serde, lambda: saver.get_next_version(None, None))

    # -- list and delta history ----------------------------------------------------------------------------------

    def flush_for_reading(self, thread_id: str | None) -> Generator[Step, Any, None]:
        """Bring a thread, or everything, to Postgres, because what follows reads Postgres alone.

        Raises:
            FlushIncompleteError: Something is left in the buffer.
            TierUnavailableError: A server cannot be reached.
        """
        yield from self.ready()
        wanted = None if thread_id is None else [thread_id]
        wait = self._options.postgres_timeout
        try:
            if thread_id is None or not (yield from self._is_flushed(thread_id)):
                yield Job(lambda session: flush_first(session, self._flusher, wanted, wait))
        except BufferUnavailableError as exc:
            yield from self._require_store_alone(thread_id, "", exc)

    def _is_flushed(self, thread_id: str) -> Generator[Step, Any, bool]:
        """Tell, at the cost of one call, whether a flush of a thread would find nothing to do."""
        if self._ledger.debt(thread_id) is not None or self._ledger.is_passed(thread_id):
            return False
        floor = self._ledger.floor(self._commands.layout.partition_of(thread_id))
        found = self._commands.read_drain((yield self._commands.drain(thread_id, 1, 1)))
        return not found.waiting and found.sequence >= floor

    def list(
        self,
        config: RunnableConfig | None,
        filter: Mapping[str, Any] | None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None,
        limit: int | None,
        saver: Any,
    ) -> Generator[Step, Any, list[CheckpointTuple]]:
        """Read the checkpoints that match, newest first."""
        address = address_of(config) if config else None
        query = self._list_query(config, address, filter, before, limit)
        yield from self.flush_for_reading(address.thread_id if address else None)
        found = [from_row(row) for row in (yield query)]
        old = [snapshot for snapshot in found if snapshot.needs_sends]
        for thread_id in dict.fromkeys(snapshot.address.thread_id for snapshot in old):
            mine = [snapshot for snapshot in old if snapshot.address.thread_id == thread_id]
            parents = [snapshot.parent_id or "" for snapshot in mine]
            stored = reads.read_sends((yield reads.sends(thread_id, parents)))
            for snapshot in mine:
                sends = stored.get(snapshot.parent_id or "", ())
                add_sends(snapshot, sends, saver.serde, lambda: saver.get_next_version(None, None))
        return [to_tuple(snapshot, saver.serde) for snapshot in found]

    def _list_query(
        self,
        config: RunnableConfig | None,
        address: Address | None,
        filter: Mapping[str, Any] | None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None,
        limit: int | None,
    ) -> Query:
        wheres: list[str] = []
        params: list[Any] = []
        if config and address:
            wheres.append("thread_id = %s")
            params.append(address.thread_id)
            if config["configurable"].get("checkpoint_ns") is not None:
                wheres.append("checkpoint_ns = %s")
                params.append(address.checkpoint_ns)
            if checkpoint_id := get_checkpoint_id(config):
                wheres.append("checkpoint_id = %s")
                params.append(checked_text(checkpoint_id, "checkpoint_id"))
        if filter:
            # Sanitised like the metadata that it is compared with.
            text, _ = dump_json(filter, "filter", "null")
            wheres.append("metadata @> %s")
            params.append(Jsonb(load_json(text)))
        if before is not None:
            wheres.append("checkpoint_id < %s")
            params.append(get_checkpoint_id(before))
        sql = reads.SELECT
        if wheres:
            sql += "WHERE " + " AND ".join(wheres)
        sql += " ORDER BY checkpoint_id DESC"
        if limit is not None:
            sql += " LIMIT %s"
            params.append(int(limit))
        return Query(sql, params, patient=True)

    def delta_history(
        self, config: RunnableConfig, channels: Sequence[str], saver: Any
    ) -> Generator[Step, Any, Mapping[str, DeltaChannelHistory]]:
        """Read the writes and seeds from which delta channels are rebuilt."""
        names = list(channels)
        if not names:
            return {}
        address = address_of(config)
        checkpoint_id = get_checkpoint_id(config)
        yield from self.flush_for_reading(address.thread_id)
        if not checkpoint_id:
            stored, _ = reads.read_latest((yield reads.latest(self._options.prefix, address)))
            if stored is None:
                return {name: {"writes": []} for name in names}
            checkpoint_id = stored.checkpoint_id
        found = yield from delta.walk(address, checkpoint_id, names)
        rows = yield from delta.contents(address, names, found)
        history: Mapping[str, DeltaChannelHistory] = saver._build_delta_channels_writes_history(
            channels=names,
            chain_by_ch=found.chain,
            seed_ver_by_ch=found.seed_version,
            seed_inline_by_ch=found.seed_inline,
            stage2_rows=rows,
        )
        return history

    # -- barriers ------------------------------------------------------------------------------------------------

    def barrier(self, work: Callable[..., None], *args: Any, threads: Sequence[str] = ()) -> Generator[Step, Any, None]:
        """Run one of `flush/barriers.py` in the flusher's thread."""
        yield from self.ready()
        self._puts.forget(threads)
        wait = self._options.postgres_timeout
        yield Job(lambda session: work(session, self._flusher, *args, wait))


def _unsafe(finding: checks.Finding) -> CheckpointEvent:
    subject = finding.code.partition(".")[0]
    return CheckpointEvent(
        name="server.unsafe",
        error_type="checkpoint_buffer_error" if subject == "redis" else "checkpoint_store_error",
        severity="warning" if finding.level == "warning" else "error",
        message=str(finding),
        component="buffer" if subject == "redis" else "store",
        operation="check",
        context={"code": finding.code, "advice": finding.advice},
    )


def thread_ids(values: Any) -> list[str]:
    """Check a sequence of thread ids, and take out repeated ones.

    Raises:
        TypeError: It is a single string.
        InvalidConfigError: An id cannot be stored.
    """
    if isinstance(values, str):
        raise TypeError("thread_ids must be a sequence of thread IDs, not a str")
    return list(dict.fromkeys(thread_text(value) for value in values))
