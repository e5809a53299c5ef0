"""A worker dies at the worst moment of a dead letter's life: Postgres has committed, Redis does not know yet."""

from __future__ import annotations

import multiprocessing
import signal
from typing import TYPE_CHECKING, Any

import poison_child
import psycopg
import pytest
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver
from poisoning import allow, forbid, put_step, put_steps, saved, values
from savers import NOTHING, put

from checkpointer import CheckpointLostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointer.embedded import Servers

AGE = frozenset({"age"})


@pytest.fixture
def die(postgres_uri: str, redis_url: str, prefix: str) -> Callable[[str], None]:
    """Has another process do something and die in the middle."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["poison_child"])

    def _die(work: str) -> None:
        child = context.Process(target=poison_child.run, args=(postgres_uri, redis_url, prefix, work))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL

    return _die


def test_a_letter_whose_worker_died_is_known_to_all_and_told_once_more(
    make: Callable[..., Any], die: Callable[[str], None], conn: psycopg.Connection[Any], postgres_uri: str
) -> None:
    saver = make()
    forbid(conn)
    ids = put_steps(saver, "t", 5, {2: "checkpoint"})
    put = values(saver, "t", ids)
    die("flush")
    assert saved(conn, "t") == ids[:2]
    assert not saver.flush()
    (letter,) = saver.dead_letters.list()
    assert letter.attempts == 1, "found once, not again by the next worker"
    assert saver.hooks.flush(5)
    assert [e.name for e in saver.events] == ["dead_letter.added"], "the one who found it could not tell"
    assert values(saver, "t", ids) == put
    ids.append(put_step(saver, "t", 5, ids[-1]))
    allow(conn)
    (done,) = saver.dead_letters.replay()
    assert done.resolution == "replayed"
    assert saved(conn, "t") == ids
    assert saver.flush()
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        assert values(stock, "t", ids[:5]) == put


@pytest.mark.parametrize("work", ["replay", "drop"])
def test_a_thread_whose_letter_was_resolved_by_a_dying_process_goes_on(
    make: Callable[..., Any], die: Callable[[str], None], conn: psycopg.Connection[Any], work: str
) -> None:
    saver = make()
    forbid(conn)
    ids = put_steps(saver, "t", 5, {2: "checkpoint"})
    assert not saver.flush()
    if work == "replay":
        allow(conn)
    die(work)
    (letter,) = saver.dead_letters.list(include_resolved=True)
    assert letter.resolution == {"replay": "replayed", "drop": "dropped"}[work]
    make(triggers=AGE, flush_age=0.05)  # a worker that has nothing to do with it
    expected = [each for each in ids if work == "replay" or each != ids[2]]
    wait_until(lambda: saved(conn, "t") == expected)
    wait_until(lambda: saver.flush())
    assert saver.get_tuple({"configurable": {"thread_id": "t"}}).config["configurable"]["checkpoint_id"] == ids[-1]
    assert saver.dead_letters.list() == []


def test_a_record_that_postgres_refuses_while_redis_is_away_is_lost_and_that_is_said(
    open_saver: Any, own_servers: Servers
) -> None:
    saver = open_saver(triggers=NOTHING)
    parent = put(saver, "t", 0)
    with psycopg.connect(own_servers.postgres_uri, autocommit=True) as conn:
        conn.execute("ALTER TABLE checkpoints ADD CHECK (checkpoint_id <> '' AND metadata ->> 'step' <> '1')")
    own_servers.valkey.kill()
    with pytest.raises(CheckpointLostError, match="of step 1"):
        put(saver, "t", 1, parent)
    (event,) = saver.named("put.failed")
    assert (event.severity, event.lost_from_step, event.error.sqlstate) == ("critical", 1, "23514")
    assert put(saver, "t", 2, parent)
