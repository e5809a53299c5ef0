"""A deleted thread stays deleted, also if a run of it goes on; a put that continues nothing begins a new life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import wait_until
from langgraph.graph import END, START, StateGraph
from savers import NOTHING, State, config, graph, make_checkpoint, put, put_chain, stock_steps, stock_tuples

if TYPE_CHECKING:
    from checkpointer.embedded import Servers


def rows_of(uri: str, thread: str = "t") -> tuple[int, ...]:
    with psycopg.connect(uri) as conn:
        counts = []
        for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes"):
            row = conn.execute(f"SELECT count(*) FROM {table} WHERE thread_id = %s", (thread,)).fetchone()  # type: ignore[arg-type]  # the three names above
            assert row is not None
            counts.append(row[0])
    return tuple(counts)


@pytest.mark.parametrize("deleted_by", ["the same", "another"])
def test_a_run_that_goes_on_does_not_bring_its_thread_back(
    open_saver: Any, own_servers: Servers, deleted_by: str
) -> None:
    saver, other = open_saver(), open_saver(triggers=NOTHING)
    deleting = saver if deleted_by == "the same" else other
    run = graph(saver, lambda: None, lambda: deleting.delete_thread("t"), lambda: None, lambda: None)
    assert run.invoke({"xs": []}, config(), durability="sync")["xs"] == [0, 1, 2, 3]
    assert saver.get_tuple(config()) is None
    assert saver.flush()
    assert other.get_tuple(config()) is None
    assert rows_of(own_servers.postgres_uri) == (0, 0, 0)
    (late,) = saver.named("put.late")
    assert (late.severity, late.thread_id, late.user_notice) == ("warning", "t", True)
    # Its id can be used again, at once.
    assert run.invoke({"xs": [7]}, config())["xs"] == [7, 0, 1, 2, 3]


async def test_the_same_for_an_asynchronous_run(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver()
    run = graph(saver, lambda: None, lambda: saver.delete_thread("t"), lambda: None)
    await run.ainvoke({"xs": []}, config(), durability="sync")
    assert await saver.aget_tuple(config()) is None
    assert await saver.aflush()
    assert rows_of(own_servers.postgres_uri) == (0, 0, 0)
    await saver.aclose()


@pytest.mark.parametrize("deleted", ["before the subgraph", "in the subgraph"])
def test_neither_do_its_subgraphs(open_saver: Any, own_servers: Servers, deleted: str) -> None:
    saver = open_saver()

    def delete_if(here: str) -> None:
        if deleted == here:
            saver.delete_thread("t")

    inner = graph(None, lambda: delete_if("in the subgraph"), lambda: None)
    builder = StateGraph(State)
    builder.add_node("first", lambda state: delete_if("before the subgraph") or {"xs": [8]})
    builder.add_node("sub", inner)
    builder.add_node("last", lambda state: {"xs": [9]})
    for a, b in ((START, "first"), ("first", "sub"), ("sub", "last"), ("last", END)):
        builder.add_edge(a, b)
    builder.compile(checkpointer=saver).invoke({"xs": []}, config(), durability="sync")
    assert saver.flush()
    assert rows_of(own_servers.postgres_uri) == (0, 0, 0)
    assert saver.get_tuple(config()) is None


def test_what_the_buffer_has_taken_before_it_knew_is_sorted_out_at_the_flush(
    open_saver: Any, own_servers: Servers
) -> None:
    saver, other = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(3))
    saver.flush()
    other.delete_thread("t")
    # The read cache forgets sooner than Postgres.
    saver._core.redis.client().delete(saver._core.commands.layout.thread("t").facts)
    parent = put_chain(saver, "t", range(3, 5), parent)
    saver.put_writes(parent, [("a", 1)], "task")
    new = put_chain(saver, "t", range(10, 12))
    saver.put_writes(new, [("a", 1)], "task")
    assert saver.flush()
    assert not saver._core.redis.client().exists(saver._core.commands.layout.thread("t").clean), "nothing to be read"
    assert stock_steps(own_servers.postgres_uri) == [11, 10]
    assert rows_of(own_servers.postgres_uri)[2] == 1
    assert saver.named("put.late")
    # What continues a late checkpoint is late too, and what continues the new life is not.
    put(saver, "t", 5, parent)
    put(saver, "t", 12, new)
    assert saver.flush()
    assert stock_steps(own_servers.postgres_uri) == [12, 11, 10]
    assert saver.get_tuple(config()).metadata["step"] == 12


def test_a_late_put_that_goes_around_redis_is_dropped_too(open_saver: Any, own_servers: Servers) -> None:
    saver, other = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(2))
    other.delete_thread("t")
    own_servers.valkey.kill()
    parent = put(saver, "t", 2, parent)
    saver.put_writes(parent, [("a", 1)], "task")
    parent = put(saver, "t", 3, parent)
    assert rows_of(own_servers.postgres_uri) == (0, 0, 0)
    new = put(saver, "t", 10)
    put(saver, "t", 11, new)
    assert stock_steps(own_servers.postgres_uri) == [11, 10]
    assert saver.named("put.late")


def test_forks_from_any_checkpoint_of_the_new_life_are_taken(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    # Another machine's clock may be behind, so that an id of the new life is lower than the last of the old one.
    behind = make_checkpoint(0)
    put_chain(saver, "t", range(3))
    saver.delete_thread("t")
    root = saver.put(config(), *behind)
    put_chain(saver, "t", range(1, 4), root)
    saver.flush()
    put(saver, "t", 7, root)
    assert saver.flush()
    assert wait_until(lambda: stock_steps(own_servers.postgres_uri)) == [7, 3, 2, 1, 0]
    assert not saver.named("put.late")


@pytest.mark.parametrize("where", ["in the buffer", "in both", "in Postgres", "in Postgres, without Redis"])
def test_a_checkpoint_of_the_new_life_that_is_put_again_is_not_late_whatever_it_continues(
    open_saver: Any, own_servers: Servers, where: str
) -> None:
    saver = open_saver(triggers=NOTHING)
    dead = put_chain(saver, "t", range(2))
    saver.delete_thread("t")
    checkpoint, metadata, new = make_checkpoint(5)
    saver.put(config(), checkpoint, metadata, new)
    if where != "in the buffer":
        assert saver.flush()
    if where == "in Postgres":
        saver._core.redis.client().delete(saver._core.commands.layout.thread("t").clean)
    elif where == "in Postgres, without Redis":
        own_servers.valkey.kill()
    saver.put(dead, checkpoint, {**metadata, "revision": 2}, new)
    if where != "in Postgres, without Redis":
        assert saver.flush()
    (stored,) = stock_tuples(own_servers.postgres_uri)
    assert stored.metadata["revision"] == 2
    assert stored.parent_config is None, "the first put of it has said what it continues"
    assert not saver.named("put.late")
