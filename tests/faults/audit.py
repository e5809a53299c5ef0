"""The books of a fault test: what was tried and acknowledged, kept outside both stores, and what a stock saver reads.

Not here: faults. A *log* is a file of JSON lines that several processes append to. Each thread has one owner at a time,
so the lines of a thread are in the order of what happened to it. `try` lines come before the call, the others after it:
what was tried may be there, what was acknowledged must be, and what nobody tried must not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from langgraph.checkpoint.base import WRITES_IDX_MAP
from langgraph.checkpoint.postgres import PostgresSaver

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from pathlib import Path


class Key(NamedTuple):
    """Names a checkpoint."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str


def key_of(config: Any) -> Key:
    found = config["configurable"]
    return Key(found["thread_id"], found.get("checkpoint_ns", ""), found["checkpoint_id"])


def checksum(value: Any) -> str:
    return hashlib.sha1(repr(value).encode()).hexdigest()[:16]


def values_checksum(values: Any) -> str:
    return checksum(sorted(values.items()))


class Log:
    """Appends lines; usable from many threads and processes, and complete up to the instant of a SIGKILL."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __call__(self, *line: Any) -> None:
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def lines(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def close(self) -> None:
        os.close(self._file)


class _Recording:
    """Before a saver's class: logs what is tried and what is acknowledged."""

    log: Log

    def put(self, config: Any, checkpoint: Any, *args: Any) -> Any:
        self._try_put(config, checkpoint)
        return self._put_done(super().put(config, checkpoint, *args))

    async def aput(self, config: Any, checkpoint: Any, *args: Any) -> Any:
        self._try_put(config, checkpoint)
        return self._put_done(await super().aput(config, checkpoint, *args))

    def _try_put(self, config: Any, checkpoint: Any) -> None:
        found = config["configurable"]
        values = values_checksum(checkpoint["channel_values"])
        self.log("try", found["thread_id"], found["checkpoint_ns"], checkpoint["id"], values)

    def _put_done(self, saved: Any) -> Any:
        self.log("put", *key_of(saved))
        return saved

    def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        self.log("try_writes", *key_of(config), task_id, _indexed(writes))
        super().put_writes(config, writes, task_id, task_path)
        self.log("writes", *key_of(config), task_id, _indexed(writes))

    async def aput_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        self.log("try_writes", *key_of(config), task_id, _indexed(writes))
        await super().aput_writes(config, writes, task_id, task_path)
        self.log("writes", *key_of(config), task_id, _indexed(writes))

    def delete_thread(self, thread_id: str) -> None:
        self.log("try_delete", thread_id)
        super().delete_thread(thread_id)
        self.log("delete", thread_id)

    async def adelete_thread(self, thread_id: str) -> None:
        self.log("try_delete", thread_id)
        await super().adelete_thread(thread_id)
        self.log("delete", thread_id)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        self.log("try_copy", source_thread_id, target_thread_id)
        super().copy_thread(source_thread_id, target_thread_id)
        self.log("copy", source_thread_id, target_thread_id)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        self.log("try_copy", source_thread_id, target_thread_id)
        await super().acopy_thread(source_thread_id, target_thread_id)
        self.log("copy", source_thread_id, target_thread_id)

    def prune(self, thread_ids: Any, *, strategy: str = "keep_latest") -> None:
        for thread in thread_ids:
            self.log("try_prune", thread)
        super().prune(thread_ids, strategy=strategy)
        for thread in thread_ids:
            self.log("prune", thread)

    async def aprune(self, thread_ids: Any, *, strategy: str = "keep_latest") -> None:
        for thread in thread_ids:
            self.log("try_prune", thread)
        await super().aprune(thread_ids, strategy=strategy)
        for thread in thread_ids:
            self.log("prune", thread)


class RecordingSaver(_Recording, BufferedPostgresSaver):
    """Ours, with books."""


class RecordingStock(_Recording, PostgresSaver):
    """LangGraph's, with books."""


def _indexed(writes: Any) -> list[tuple[int, str, str]]:
    return [(WRITES_IDX_MAP.get(channel, i), channel, checksum(value)) for i, (channel, value) in enumerate(writes)]


# -- what the log says ------------------------------------------------------------------------------------------------


@dataclass
class Thread:
    """What must, may and must not be there of one thread.

    Attributes:
        tried: Checkpoint -> (task, index) of a pending write -> channel and value's checksum of each try, in this
            life of the thread. Which one of several stays depends on who was first.
        values: Checkpoint -> checksums of the values that it was put with.
        puts: Checkpoints that must be there.
        writes: Checkpoint -> (task, index) of the pending writes that must be there.
        dead: What must not be there.
        superseded: What the prune that was tried last takes away.
    """

    tried: dict[tuple[str, str], dict[tuple[str, int], set[tuple[str, str]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )
    values: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    puts: set[tuple[str, str]] = field(default_factory=set)
    writes: dict[tuple[str, str], set[tuple[str, int]]] = field(default_factory=lambda: defaultdict(set))
    dead: set[tuple[str, str]] = field(default_factory=set)
    superseded: set[tuple[str, str]] = field(default_factory=set)

    def may_be_deleted(self) -> None:
        self.puts.clear()
        self.writes.clear()

    def is_deleted(self) -> None:
        self.may_be_deleted()
        self.dead |= set(self.tried)
        self.tried.clear()

    def may_be_pruned(self) -> None:
        acknowledged = max((key for key in self.puts if key[0] == ""), default=("", ""))
        self.superseded = {key for key in self.tried if key[0] == "" and key < acknowledged}
        # One that was tried and not acknowledged may be the latest, which a prune keeps.
        latest = max((key for key in self.tried if key[0] == ""), default=("", ""))
        self.puts &= {latest}
        for key in [key for key in self.writes if key != latest]:
            del self.writes[key]

    def is_pruned(self) -> None:
        self.dead |= self.superseded

    def becomes_copy_of(self, source: Thread, *, surely: bool) -> None:
        for key, tries in source.tried.items():
            for write, found in tries.items():
                self.tried[key][write] |= found
            self.tried[key] |= {}
        for key, values in source.values.items():
            self.values[key] |= values
        if surely:
            self.puts |= source.puts
            for key, writes in source.writes.items():
                self.writes[key] |= writes


@dataclass
class Books:
    """A log, read."""

    threads: dict[str, Thread] = field(default_factory=lambda: defaultdict(Thread))
    puts: int = 0
    writes: int = 0

    def read(self, lines: list[list[Any]]) -> None:
        for kind, *rest in lines:
            if read := getattr(self, f"_{kind}", None):
                read(self.threads[rest[0]], *rest[1:])

    def _try(self, thread: Thread, ns: str, checkpoint: str, values: str) -> None:
        thread.tried[ns, checkpoint] |= {}
        thread.values[ns, checkpoint].add(values)

    def _put(self, thread: Thread, ns: str, checkpoint: str) -> None:
        self.puts += 1
        thread.puts.add((ns, checkpoint))

    def _try_writes(self, thread: Thread, ns: str, checkpoint: str, task: str, writes: list[Any]) -> None:
        for idx, channel, value in writes:
            thread.tried[ns, checkpoint][task, idx].add((channel, value))

    def _writes(self, thread: Thread, ns: str, checkpoint: str, task: str, writes: list[Any]) -> None:
        self.writes += len(writes)
        thread.writes[ns, checkpoint] |= {(task, idx) for idx, _, _ in writes}

    def _try_delete(self, thread: Thread) -> None:
        thread.may_be_deleted()

    def _delete(self, thread: Thread) -> None:
        thread.is_deleted()

    def _try_prune(self, thread: Thread) -> None:
        thread.may_be_pruned()

    def _prune(self, thread: Thread) -> None:
        thread.is_pruned()

    def _try_copy(self, thread: Thread, target: str) -> None:
        self.threads[target].becomes_copy_of(thread, surely=False)

    def _copy(self, thread: Thread, target: str) -> None:
        self.threads[target].becomes_copy_of(thread, surely=True)


# -- what a stock saver reads -----------------------------------------------------------------------------------------

_PARENTLESS = """
SELECT c.thread_id, c.checkpoint_ns, c.checkpoint_id, c.parent_checkpoint_id FROM checkpoints c
WHERE c.parent_checkpoint_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM checkpoints p
    WHERE (p.thread_id, p.checkpoint_ns, p.checkpoint_id) = (c.thread_id, c.checkpoint_ns, c.parent_checkpoint_id))
"""

_ALL_WRITES = "SELECT thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel FROM checkpoint_writes"


@dataclass
class Findings:
    """What is wrong, in words.

    Attributes:
        lost: Acknowledged and not there.
        changed: There, acknowledged or not, with other values than it was put with, so half of a checkpoint too.
        orphaned: A checkpoint without its parent.
        duplicated: There although nobody put it, or twice.
        resurrected: There although it was deleted or pruned.
    """

    lost: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    orphaned: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    resurrected: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        return "\n".join(
            f"{kind}: {len(found)}" + "".join(f"\n    {one}" for one in found[:10])
            for kind, found in vars(self).items()
        )


def audit(postgres_uri: str, books: Books) -> Findings:
    """Compare the books with what a stock saver reads; everything must have been flushed."""
    findings = Findings()
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        for thread_id, ns, checkpoint, parent in conn.execute(_PARENTLESS):
            findings.orphaned.append(f"{thread_id} {ns!r} {checkpoint}: parent {parent} is not there")
        written: dict[Key, dict[tuple[str, int], str]] = defaultdict(dict)
        for *key, task, idx, channel in conn.execute(_ALL_WRITES):
            written[Key(*key)][task, idx] = channel
        threads = {row[0] for row in conn.execute("SELECT DISTINCT thread_id FROM checkpoints")}
    threads |= {key.thread_id for key in written}
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        for thread_id in sorted(threads | set(books.threads)):
            tuples = list(stock.list({"configurable": {"thread_id": thread_id}}))
            mine = {key: found for key, found in written.items() if key.thread_id == thread_id}
            _compare(books.threads[thread_id], thread_id, tuples, mine, findings)
    return findings


def _compare(
    thread: Thread,
    thread_id: str,
    tuples: list[Any],
    written: dict[Key, dict[tuple[str, int], str]],
    findings: Findings,
) -> None:
    there = {key_of(found.config)[1:]: found for found in tuples}
    if len(there) < len(tuples):
        findings.duplicated.append(f"{thread_id}: {len(tuples) - len(there)} checkpoints are listed twice")
    for key in [*there, *(found[1:] for found in written)]:
        if key not in thread.tried:
            kind = findings.resurrected if key in thread.dead else findings.duplicated
            kind.append(f"{thread_id} {key}")
        elif key in thread.dead and key in there:
            findings.resurrected.append(f"{thread_id} {key} (pruned)")
    findings.lost += [f"{thread_id} {key}" for key in sorted(thread.puts - set(there))]
    for key, found in there.items():
        if values_checksum(found.checkpoint["channel_values"]) not in thread.values[key]:
            findings.changed.append(f"{thread_id} {key}: {found.checkpoint['channel_values']}")
    for key, wanted in thread.writes.items():
        for task, idx in wanted - set(written.get(Key(thread_id, *key), ())):
            findings.lost.append(f"{thread_id} {key} write {task} {idx}")
    for whole_key, rows in written.items():
        key = whole_key[1:]
        if key not in thread.tried:
            continue  # told above
        tries = thread.tried[key]
        findings.duplicated += [f"{thread_id} {key} write {row}" for row in rows if row not in tries]
        if (found := there.get(key)) is None:
            continue
        if len(found.pending_writes) != len(rows):
            findings.duplicated.append(f"{whole_key}: {len(found.pending_writes)} writes are read of {len(rows)} rows")
        possible = {(task, *one) for (task, _), values in tries.items() for one in values}
        for task, channel, value in found.pending_writes:
            # LangGraph's own control values do not come back as the very same types.
            if channel not in WRITES_IDX_MAP and (task, channel, checksum(value)) not in possible:
                findings.changed.append(f"{thread_id} {key} write of {task} to {channel}: {value}")
