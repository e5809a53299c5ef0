"""Random operations on ours and on stock PostgresSaver must give equal answers, flushed or not."""

from __future__ import annotations

import copy
import string
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from langgraph.checkpoint.base import CheckpointTuple

NAMESPACES = ("", "child", "child:1", "a|b:2")
CHANNELS = ("messages", "count", "note", "data", "odd name")
SPECIAL = ("__error__", "__interrupt__", "__resume__", "__scheduled__")

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8),
)
values = st.one_of(
    scalars,
    st.lists(st.integers(-5, 5), max_size=4),
    st.dictionaries(st.text(string.ascii_letters, max_size=3), st.integers(-5, 5), max_size=3),
    st.binary(max_size=6),
    st.tuples(st.integers(), st.text(string.ascii_letters, max_size=3)).filter(lambda t: abs(t[0]) < 2**63),
)


def config(thread: str, ns: str, checkpoint_id: str | None = None) -> Any:
    found = {"thread_id": thread, "checkpoint_ns": ns}
    if checkpoint_id:
        found["checkpoint_id"] = checkpoint_id
    return {"configurable": found}


def plain(found: CheckpointTuple | None) -> Any:
    if found is None:
        return None
    checkpoint = found.checkpoint
    if checkpoint["v"] < 4:
        # Where sends move from the parent's writes into a checkpoint without versions, their version is random.
        versions = {c: v for c, v in checkpoint["channel_versions"].items() if c != "__pregel_tasks"}
        checkpoint = {**checkpoint, "channel_versions": versions}
    return (found.config, checkpoint, found.metadata, found.parent_config, found.pending_writes)


class Savers(RuleBasedStateMachine):
    """Applies each operation to both savers; reads are compared as they are made, and at the end of each step."""

    ours: BufferedPostgresSaver
    stock: PostgresSaver
    buffer: redis.Redis

    saved = Bundle("saved")

    @initialize()
    def begin(self) -> None:
        self.threads = [f"{uuid4().hex}{suffix}" for suffix in ("", "}{", ":x")]
        self.steps = 0
        # (thread, ns) -> checkpoints saved, as (id, channel_values, channel_versions)
        self.history: dict[tuple[str, str], list[tuple[str, dict[str, Any], dict[str, Any]]]] = {}
        self.touched: set[tuple[str, str]] = set()

    def both(self, method: str, *args: Any, **kwargs: Any) -> None:
        getattr(self.ours, method)(*copy.deepcopy(args), **kwargs)
        getattr(self.stock, method)(*copy.deepcopy(args), **kwargs)

    @rule(
        target=saved,
        thread=st.integers(0, 2),
        ns=st.sampled_from(NAMESPACES),
        changed=st.dictionaries(st.sampled_from(CHANNELS), values, max_size=3),
        fork=st.integers(0, 5),
        version=st.sampled_from((2, 4, 4, 4)),
        extra=st.dictionaries(st.sampled_from(("user", "tag")), scalars, max_size=2),
    )
    def put(self, thread: int, ns: str, changed: dict[str, Any], fork: int, version: int, extra: dict[str, Any]) -> Any:
        where = (self.threads[thread], ns)
        past = self.history.setdefault(where, [])
        parent = past[-1 - fork % len(past)] if past and fork < 4 else None
        checkpoint_id = str(uuid6(clock_seq=self.steps))
        self.steps += 1
        values_now = {**(parent[1] if parent else {}), **changed}
        new = {channel: f"{self.steps:032}.{uuid4().int % 10**16:016}" for channel in changed}
        versions = {**(parent[2] if parent else {}), **new}
        checkpoint = {
            "v": version,
            "id": checkpoint_id,
            "ts": "2026-01-01T00:00:00+00:00",
            "channel_values": values_now,
            "channel_versions": versions,
            "versions_seen": {"node": dict(new)},
            "updated_channels": sorted(new),
        }
        metadata = {"source": "loop", "step": self.steps, "parents": {"": "x"}, **extra}
        self.both("put", config(*where, parent[0] if parent else None), checkpoint, metadata, new)
        past.append((checkpoint_id, values_now, versions))
        self.touched.add(where)
        return (*where, checkpoint, metadata)

    @rule(entry=saved, step=st.integers(100, 200), other_parent=st.booleans())
    def put_again(self, entry: Any, step: int, other_parent: bool) -> None:
        thread, ns, checkpoint, metadata = entry
        if (thread, ns) not in self.history or checkpoint["id"] not in {c[0] for c in self.history[thread, ns]}:
            return
        parent = "1ef00000-0000-6000-8000-000000000000" if other_parent else None
        changed = {**checkpoint, "updated_channels": ["again"]}
        self.both("put", config(thread, ns, parent), changed, {**metadata, "step": step}, {})
        self.touched.add((thread, ns))

    @rule(
        entry=saved,
        writes=st.lists(st.tuples(st.sampled_from((*CHANNELS, "__pregel_tasks")), values), max_size=3),
        task=st.integers(0, 2),
        path=st.sampled_from(("", "~__pregel_pull, b", "~__pregel_pull, a")),
    )
    def put_writes(self, entry: Any, writes: list[tuple[str, Any]], task: int, path: str) -> None:
        thread, ns, checkpoint, _ = entry
        self.both("put_writes", config(thread, ns, checkpoint["id"]), writes, f"task-{task}", path)
        self.touched.add((thread, ns))

    @rule(
        entry=saved,
        writes=st.lists(st.tuples(st.sampled_from((*SPECIAL, "data")), scalars), min_size=1, max_size=2),
        task=st.integers(0, 1),
    )
    def put_special_writes(self, entry: Any, writes: list[tuple[str, Any]], task: int) -> None:
        thread, ns, checkpoint, _ = entry
        self.both("put_writes", config(thread, ns, checkpoint["id"]), writes, f"task-{task}")
        self.touched.add((thread, ns))

    @rule(target=saved, thread=st.integers(0, 2), ns=st.sampled_from(NAMESPACES), value=values)
    def put_writes_before_put(self, thread: int, ns: str, value: Any) -> Any:
        where = (self.threads[thread], ns)
        checkpoint_id = str(uuid6(clock_seq=self.steps))
        self.steps += 1
        past = self.history.setdefault(where, [])
        parent = past[-1] if past else None
        self.both("put_writes", config(*where, checkpoint_id), [("data", value), ("note", 1)], "early", "p")
        self.compare_latest(*where)
        checkpoint = {
            "v": 4,
            "id": checkpoint_id,
            "ts": "2026-01-01T00:00:00+00:00",
            "channel_values": parent[1] if parent else {},
            "channel_versions": parent[2] if parent else {},
            "versions_seen": {},
            "updated_channels": None,
        }
        metadata = {"source": "loop", "step": self.steps, "parents": {}}
        self.both("put", config(*where, parent[0] if parent else None), checkpoint, metadata, {})
        past.append((checkpoint_id, checkpoint["channel_values"], checkpoint["channel_versions"]))
        self.touched.add(where)
        return (*where, checkpoint, metadata)

    @rule(thread=st.none() | st.integers(0, 2))
    def flush(self, thread: int | None) -> None:
        assert self.ours.flush(None if thread is None else self.threads[thread])

    @rule(thread=st.integers(0, 2))
    def read_cache_expires(self, thread: int) -> None:
        keys = self.ours._core.commands.layout.thread(self.threads[thread])
        if not self.buffer.exists(keys.dirty):
            self.buffer.delete(keys.facts, keys.clean, keys.writes)
        else:
            self.buffer.delete(keys.clean)
        self.touched |= {where for where in self.history if where[0] == self.threads[thread]}

    @rule(thread=st.integers(0, 2))
    def delete_thread(self, thread: int) -> None:
        name = self.threads[thread]
        self.both("delete_thread", name)
        for where in [w for w in self.history if w[0] == name]:
            del self.history[where]
            self.touched.add(where)

    @rule(thread=st.integers(0, 2))
    def prune(self, thread: int) -> None:
        name = self.threads[thread]
        self.both("prune", [name], strategy="keep_latest")
        for where in [w for w in self.history if w[0] == name]:
            left = self.stock.get_tuple(config(*where))
            kept = left.checkpoint["id"] if left else None
            self.history[where] = [c for c in self.history[where] if c[0] == kept]
            if not self.history[where]:
                del self.history[where]
            self.touched.add(where)

    @rule(entry=saved)
    def read_by_id(self, entry: Any) -> None:
        thread, ns, checkpoint, _ = entry
        where = config(thread, ns, checkpoint["id"])
        assert plain(self.ours.get_tuple(where)) == plain(self.stock.get_tuple(where))

    @rule(
        thread=st.none() | st.integers(0, 2),
        ns=st.none() | st.sampled_from(NAMESPACES),
        limit=st.none() | st.integers(0, 4),
        wanted=st.none() | st.fixed_dictionaries({"step": st.integers(1, 10)}) | st.just({"source": "loop"}),
        entry=st.none() | saved,
    )
    def list_equally(self, thread: int | None, ns: str | None, limit: int | None, wanted: Any, entry: Any) -> None:
        if thread is None and wanted is None:
            wanted = {"tag": uuid4().hex}
        where = None
        if thread is not None:
            where = {"configurable": {"thread_id": self.threads[thread]}}
            if ns is not None:
                where["configurable"]["checkpoint_ns"] = ns
        before = {"configurable": {"checkpoint_id": entry[2]["id"]}} if entry else None
        if thread is None:
            limit = None
        mine = [plain(t) for t in self.ours.list(where, filter=wanted, before=before, limit=limit)]
        theirs = [plain(t) for t in self.stock.list(where, filter=wanted, before=before, limit=limit)]
        if thread is None:  # other examples' threads are in the tables too
            mine = [t for t in mine if t[0]["configurable"]["thread_id"] in self.threads]
            theirs = [t for t in theirs if t[0]["configurable"]["thread_id"] in self.threads]
        assert mine == theirs

    @rule(entry=saved, channel=st.sampled_from(CHANNELS))
    def delta_history(self, entry: Any, channel: str) -> None:
        thread, ns, checkpoint, _ = entry
        where = config(thread, ns, checkpoint["id"])
        assert self.ours.get_delta_channel_history(config=where, channels=[channel]) == (
            self.stock.get_delta_channel_history(config=where, channels=[channel])
        )

    def compare_latest(self, thread: str, ns: str) -> None:
        where = config(thread, ns)
        assert plain(self.ours.get_tuple(where)) == plain(self.stock.get_tuple(where))

    @invariant()
    def latest_is_equal(self) -> None:
        for where in getattr(self, "touched", ()):
            self.compare_latest(*where)
        self.touched = set()


@pytest.mark.timeout(600)
def test_random_operations_give_the_same_answers_as_stock(postgres_uri: str, redis_url: str, prefix: str) -> None:
    # Stock writes to a schema of its own in the same database.
    with psycopg.connect(postgres_uri, autocommit=True) as admin:
        admin.execute("CREATE SCHEMA stock")
    separator = "&" if "?" in postgres_uri else "?"
    stock_uri = f"{postgres_uri}{separator}options=-csearch_path%3Dstock"
    with (
        BufferedPostgresSaver.from_conn_string(
            postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), triggers=frozenset()
        ) as ours,
        PostgresSaver.from_conn_string(stock_uri) as stock,
        redis.Redis.from_url(redis_url) as buffer,
    ):
        ours.setup()
        stock.setup()
        machine = type("Machine", (Savers,), {"ours": ours, "stock": stock, "buffer": buffer})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=60,
                stateful_step_count=25,
                deadline=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
