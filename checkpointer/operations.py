"""What the saver does, step by step, without I/O: each operation is a generator that yields steps and receives replies.

Not here: doing a step. A *step* is a script call (one Redis round trip), a query (one Postgres round trip) or a job for
the flusher's thread; `saver.py` has the two runners, synchronous and asynchronous, so the two cannot drift apart. A
step that fails is raised inside the generator, which decides what that means.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from langgraph.checkpoint.base import get_checkpoint_id
from psycopg.types.json import Jsonb

from checkpointer.buffer.commands import BufferRead, Commands, ScriptCall, pack_known
from checkpointer.errors import (
    BufferUnavailableError,
    CheckpointLostError,
    StoreUnavailableError,
    UnsupportedServerError,
)
from checkpointer.events import CheckpointEvent, describe_error
from checkpointer.flush.barriers import flush_first
from checkpointer.flush.session import LockedElsewhereError, check_partitions
from checkpointer.merge import (
    Snapshot,
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
    saved_config,
    thread_text,
)
from checkpointer.sanitize import dump_json, load_json
from checkpointer.store import delta, reads
from checkpointer.store.clients import not_set_up
from checkpointer.store.reads import Query
from checkpointer.store.writes import Batch

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Generator, Mapping, Sequence

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import CheckpointTuple, DeltaChannelHistory

    from checkpointer.flush.ledger import Ledger
    from checkpointer.flush.session import Session
    from checkpointer.options import BufferOptions
    from checkpointer.sanitize import Change
    from checkpointer.tiers import Tier

T = TypeVar("T")

_MIN_POSTGRES = 15_00_00
_KNOWN_THREADS = 10_000


@dataclass(frozen=True, slots=True)
class Job:
    """Work for the flusher's thread."""

    work: Callable[[Session], Any]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Ask Redis for its `INFO server`."""


Step = ScriptCall | Query | Job | ServerInfo


class Operations:
    """The operations of one saver; shared by its clones.

    Args:
        commands: Builds the script calls.
        ledger: What this process owes.
        options: The saver's settings.
        emit: Takes events.
        redis_tier: The health of Redis.
        wake: Has threads flushed soon.
    """

    def __init__(
        self,
        commands: Commands,
        ledger: Ledger,
        options: BufferOptions,
        emit: Callable[[CheckpointEvent], None],
        redis_tier: Tier,
        wake: Callable[[list[str]], None],
        lock: threading.Lock,
    ) -> None:
        self._commands = commands
        self._ledger = ledger
        self._options = options
        self._emit = emit
        self._redis_tier = redis_tier
        self._wake = wake
        self._lock = lock
        self._store_checked = False
        self._buffer_checked = False
        # What cold reads learned of whole threads: thread -> packed heads, for the thread's next put.
        self._known: OrderedDict[str, bytes] = OrderedDict()
        # Threads whose users were told of the outage of Redis with this number.
        self._told: set[str] = set()
        self._told_of = 0

    # -- the door ------------------------------------------------------------------------------------------------

    def ready(self) -> Generator[Step, Any, None]:
        """Check both servers, once; a server that is away is checked another time.

        Raises:
            NotSetUpError: The tables are missing.
            UnsupportedServerError: A server is too old.
            ConfigurationError: The application has another number of partitions.
        """
        if not self._store_checked:
            with contextlib.suppress(StoreUnavailableError):
                row = (yield reads.ready())[0]
                if row["version"] < _MIN_POSTGRES:
                    raise UnsupportedServerError(
                        f"Postgres {row['version'] // 10000} is too old: use PostgreSQL 15 or newer."
                    )
                if not row["tables"]:
                    raise not_set_up(LookupError("the checkpoint tables"))
                for stored in (yield reads.partitions(self._options.prefix)):
                    check_partitions(self._options, stored["partitions"])
                self._store_checked = True
        if not self._buffer_checked:
            with contextlib.suppress(BufferUnavailableError):
                yield from self.check_buffer()

    def register(self) -> Generator[Step, Any, None]:
        """Note in Postgres into how many partitions the threads are divided, and check both servers.

        Raises:
            ConfigurationError: The application has another number of partitions.
            UnsupportedServerError: A server is too old.
            TierUnavailableError: A server cannot be reached.
        """
        yield Job(lambda session: session.connection())
        yield from self.ready()
        yield from self.check_buffer()

    def check_buffer(self) -> Generator[Step, Any, None]:
        """Check the version of Redis.

        Raises:
            UnsupportedServerError: It is too old.
            BufferUnavailableError: It cannot be reached.
        """
        info = yield ServerInfo()
        version = str(info.get("redis_version", "0"))
        if int(version.split(".")[0]) < 7:
            raise UnsupportedServerError(f"Redis {version} is too old: use Redis 7.0 or newer, or Valkey.")
        self._buffer_checked = True

    # -- put -----------------------------------------------------------------------------------------------------

    def put(self, put: Put, codec: Codec) -> Generator[Step, Any, RunnableConfig]:
        """Store a checkpoint: in the buffer, or in Postgres if the buffer cannot take it."""
        yield from self.ready()
        address = put.address
        self._ledger.begin(address.thread_id)
        self._report_changes(address, put.changes, "put", put.row.checkpoint_id, put.step, put.run_id)
        try:
            reply = self._commands.read_put((yield self._commands.put(put, self._known.pop(address.thread_id, b""))))
        except BufferUnavailableError as exc:
            yield from self._put_around(put, codec, exc)
            return saved_config(address, put.row.checkpoint_id)
        self._note(address, reply.sequence, len(put.blobs) + 1, is_checkpoint=True, step=put.step, run_id=put.run_id)
        if reply.lacks:
            blobs = codec.encode_blobs(put, reply.lacks)
            # The put is acknowledged; without the unchanged channels, reads ask Postgres for them.
            with contextlib.suppress(BufferUnavailableError):
                yield self._commands.fill(address, put.row.checkpoint_id, blobs)
        return saved_config(address, put.row.checkpoint_id)

    def _put_around(self, put: Put, codec: Codec, cause: BufferUnavailableError) -> Generator[Step, Any, None]:
        if b'"counters_since_delta_snapshot"' in put.row.metadata and self._ledger.debt(put.address.thread_id):
            self._lost(put.address, cause, "put", put.row.checkpoint_id, put.step, put.run_id)
            raise CheckpointLostError(
                "Redis cannot be reached, and this thread has a DeltaChannel whose latest writes are only there, so "
                "the checkpoint cannot go straight to Postgres. Resume the thread when Redis is back."
            ) from cause
        # All values, not only the changed ones: the unchanged may be in the buffer only.
        new = {blob.ref for blob in put.blobs}
        missing = [i for i, ref in enumerate(put.row.refs, 1) if ref not in new]
        batch = Batch()
        for blob in (*put.blobs, *codec.encode_blobs(put, missing)):
            batch.add_blob(put.address, blob)
        batch.add_checkpoint(put.address, put.row)
        yield from self._go_around(put.address, batch, cause, "put", put.row.checkpoint_id, put.step, put.run_id)

    def put_writes(self, put: PutWrites) -> Generator[Step, Any, None]:
        """Store pending writes: in the buffer, or in Postgres if the buffer cannot take them."""
        if not put.writes:
            return
        yield from self.ready()
        address = put.address
        self._ledger.begin(address.thread_id)
        self._report_changes(address, put.changes, "put_writes", put.checkpoint_id, None, put.run_id)
        try:
            sequence = int((yield self._commands.put_writes(put)))
        except BufferUnavailableError as exc:
            batch = Batch()
            for write in put.writes:
                batch.add_write(address, put.checkpoint_id, write)
            yield from self._go_around(address, batch, exc, "put_writes", put.checkpoint_id, None, put.run_id)
            return
        self._note(address, sequence, len(put.writes), is_checkpoint=False, run_id=put.run_id)

    def _note(
        self,
        address: Address,
        sequence: int,
        records: int,
        *,
        is_checkpoint: bool,
        step: int | None = None,
        run_id: str | None = None,
    ) -> None:
        owed = self._ledger.note(
            address.thread_id,
            address.checkpoint_ns,
            sequence,
            records,
            is_checkpoint=is_checkpoint,
            step=step,
            run_id=run_id,
        )
        if owed >= self._options.flush_size and "size" in self._options.triggers:
            self._wake(self._ledger.threads())

    def _go_around(
        self,
        address: Address,
        batch: Batch,
        cause: BufferUnavailableError,
        operation: str,
        checkpoint_id: str,
        step: int | None,
        run_id: str | None,
    ) -> Generator[Step, Any, None]:
        wait = self._options.postgres_timeout
        try:
            yield Job(lambda session: session.write_around(batch, [address.thread_id], wait))
        except (StoreUnavailableError, LockedElsewhereError) as exc:
            self._lost(address, exc, operation, checkpoint_id, step, run_id)
            raise CheckpointLostError(
                f"Neither Redis nor Postgres took the {operation}"
                + ("" if step is None else f" of step {step}")
                + "; what the run does from here on is not saved. Resume the thread when the servers are back."
            ) from exc
        with self._lock:
            if self._told_of != self._redis_tier.outages:
                self._told_of = self._redis_tier.outages
                self._told.clear()
            if address.thread_id in self._told:
                return
            self._told.add(address.thread_id)
        self._emit(
            CheckpointEvent(
                name="put.around",
                error_type="checkpoint_buffer_error",
                severity="warning",
                message="The buffer cannot be reached; checkpoints of this thread go straight to the database.",
                thread_id=address.thread_id,
                run_id=run_id,
                checkpoint_ns=address.checkpoint_ns,
                checkpoint_id=checkpoint_id,
                step=step,
                operation=operation,
                outcome="recovered",
                checkpoint_count=len(batch.checkpoints),
                error=describe_error(cause.__cause__ or cause),
                user_notice=True,
            )
        )

    def _lost(
        self,
        address: Address,
        cause: BaseException,
        operation: str,
        checkpoint_id: str,
        step: int | None,
        run_id: str | None,
    ) -> None:
        self._emit(
            CheckpointEvent(
                name="put.failed",
                error_type="checkpoint_lost",
                severity="critical",
                message="Neither Redis nor Postgres could take a checkpoint; the run is not saved from "
                + ("here" if step is None else f"step {step}")
                + " on.",
                thread_id=address.thread_id,
                run_id=run_id,
                checkpoint_ns=address.checkpoint_ns,
                checkpoint_id=checkpoint_id,
                step=step,
                operation=operation,
                outcome="lost",
                lost_from_step=step,
                checkpoint_count=int(operation == "put"),
                error=describe_error(cause),
                user_notice=True,
            )
        )

    def _report_changes(
        self,
        address: Address,
        changes: Sequence[Change],
        operation: str,
        checkpoint_id: str,
        step: int | None,
        run_id: str | None,
    ) -> None:
        if not changes:
            return
        shown = ", ".join(f"{change.path} ({change.kind})" for change in changes[:5])
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        self._emit(
            CheckpointEvent(
                name="put.sanitized",
                error_type="checkpoint_sanitized",
                severity="warning",
                message=f"Values that Postgres cannot hold were replaced: {shown}{more}.",
                thread_id=address.thread_id,
                run_id=run_id,
                checkpoint_ns=address.checkpoint_ns,
                checkpoint_id=checkpoint_id,
                step=step,
                operation=operation,
                context={
                    "changes": [{"path": c.path, "kind": c.kind} for c in changes[:100]],
                    "change_count": len(changes),
                },
            )
        )

    # -- get_tuple -----------------------------------------------------------------------------------------------

    def get_tuple(self, config: RunnableConfig, saver: Any) -> Generator[Step, Any, CheckpointTuple | None]:
        """Read one checkpoint, the latest if the config names none."""
        address = address_of(config)
        checkpoint_id = get_checkpoint_id(config) or None
        yield from self.ready()
        snapshot = yield from self._snapshot(address, checkpoint_id)
        if snapshot is None:
            return None
        if snapshot.needs_sends:
            yield from self._add_sends(snapshot, saver)
        return to_tuple(snapshot, saver.serde)

    def _snapshot(self, address: Address, checkpoint_id: str | None) -> Generator[Step, Any, Snapshot | None]:
        read = self._commands.read_read
        try:
            found = read(checkpoint_id, (yield self._commands.read(address, checkpoint_id)))
        except BufferUnavailableError as exc:
            return (yield from self._snapshot_without_buffer(address, checkpoint_id, exc))
        if checkpoint_id is None and (found.complete or (found.knows_all and found.head is None)):
            if not self._options.verify_reads:
                return from_buffer(address, found, None)
            try:
                verdict = reads.read_verdict((yield reads.verify(address)))
            except StoreUnavailableError:
                return from_buffer(address, found, None)
            if stands(found, verdict):
                return from_buffer(address, found, verdict)
            # Something went around Redis. Anew, and Redis first: records move from there to Postgres.
            try:
                found = read(None, (yield self._commands.read(address, None, full=True)))
            except BufferUnavailableError as exc:
                return (yield from self._snapshot_without_buffer(address, None, exc))
        return (yield from self._merged(address, checkpoint_id, found))

    def _merged(
        self, address: Address, checkpoint_id: str | None, found: BufferRead
    ) -> Generator[Step, Any, Snapshot | None]:
        """Read Postgres too, and merge."""
        try:
            if checkpoint_id is None:
                stored, heads = reads.read_latest((yield reads.latest(address)))
                if heads is not None and not found.knows_all:
                    self._learn(address.thread_id, pack_known(heads))
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
            if found.complete and checkpoint_id in (None, found.head):
                return from_buffer(address, found, None)
            if self._options.on_unverifiable == "serve":
                return from_buffer(address, found, None)
            raise StoreUnavailableError(
                f"Postgres cannot be reached, and Redis does not hold all of thread {address.thread_id!r}. Try again "
                "when Postgres is back, or set on_unverifiable='serve' to read what Redis has."
            ) from exc

    def _learn(self, thread_id: str, known: bytes) -> None:
        with self._lock:
            self._known[thread_id] = known
            while len(self._known) > _KNOWN_THREADS:
                self._known.popitem(last=False)

    def _snapshot_without_buffer(
        self, address: Address, checkpoint_id: str | None, cause: BufferUnavailableError
    ) -> Generator[Step, Any, Snapshot | None]:
        self._require_store_alone(address, cause)
        if checkpoint_id is None:
            return reads.read_latest((yield reads.latest(address)))[0]
        return reads.read_one((yield reads.one(address, checkpoint_id)))

    def _require_store_alone(self, address: Address, cause: BufferUnavailableError) -> None:
        """Check that Postgres alone may answer while Redis is away.

        It may for the namespace of a subgraph call (it ends in its task's id) of a thread that this process is
        working on, if nothing of it is buffered: nobody else has written there.
        """
        if self._options.on_unverifiable == "serve":
            return
        debt = self._ledger.debt(address.thread_id)
        mine = self._ledger.works_on(address.thread_id)
        last = address.checkpoint_ns.rpartition("|")[2]
        if mine and ":" in last and (debt is None or address.checkpoint_ns not in debt.namespaces):
            return
        raise BufferUnavailableError(
            f"Redis cannot be reached, and it may hold checkpoints of thread {address.thread_id!r} that Postgres does "
            "not have yet. Try again when Redis is back, or set on_unverifiable='serve' to read what Postgres has."
        ) from cause

    def _add_sends(self, snapshot: Snapshot, saver: Any) -> Generator[Step, Any, None]:
        parent = snapshot.parent_id or ""
        address = snapshot.address
        buffered = self._commands.read_read(parent, (yield self._commands.read(address, parent)))
        stored = reads.read_sends((yield reads.sends(address.thread_id, [parent])))
        writes = merge_writes(stored.get(parent, ()), buffered.writes_of(parent))
        add_sends(snapshot, writes, saver.serde, lambda: saver.get_next_version(None, None))

    # -- list and delta history ----------------------------------------------------------------------------------

    def flush_for_reading(self, thread_id: str | None) -> Generator[Step, Any, None]:
        """Bring a thread, or everything, to Postgres, because what follows reads Postgres alone.

        Raises:
            FlushIncompleteError: Something is left in the buffer.
            TierUnavailableError: A server cannot be reached.
        """
        yield from self.ready()
        threads = None if thread_id is None else [thread_id]
        wait = self._options.postgres_timeout
        try:
            yield Job(lambda session: flush_first(session, self._ledger, threads, wait))
        except BufferUnavailableError as exc:
            if self._options.on_unverifiable == "raise":
                raise BufferUnavailableError(
                    "Redis cannot be reached, and it may hold checkpoints that Postgres does not have yet. Try again "
                    "when Redis is back, or set on_unverifiable='serve' to read what Postgres has."
                ) from exc

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
        return Query(sql, params)

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
            stored, _ = reads.read_latest((yield reads.latest(address)))
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
        with self._lock:
            for thread in threads:
                self._known.pop(thread, None)
        wait = self._options.postgres_timeout
        yield Job(lambda session: work(session, self._ledger, *args, wait))


def thread_ids(values: Any) -> list[str]:
    """Check a sequence of thread ids, and take out repeated ones.

    Raises:
        TypeError: It is a single string.
        InvalidConfigError: An id cannot be stored.
    """
    if isinstance(values, str):
        raise TypeError("thread_ids must be a sequence of thread IDs, not a str")
    return list(dict.fromkeys(thread_text(value) for value in values))
