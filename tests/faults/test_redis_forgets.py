"""A Redis that comes back empty, or older than it was, is noticed, and does as little harm as it can."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from graphs import build_deltas
from helpers import wait_until
from savers import NOTHING, Recording, config, graph, put, put_chain, reachable, stock_steps, stock_tuples

from checkpointer import AcknowledgementError, CheckpointLostError

if TYPE_CHECKING:
    from checkpointer.embedded import Servers


def empty(saver: Recording) -> None:
    """Make Redis forget everything, as a restart without its files does."""
    saver._core.redis.client().flushall()


class OldKeys:
    """Redis' keys as they were, to go back to them."""

    def __init__(self, saver: Recording) -> None:
        self._client = saver._core.redis.client()
        self._kept = {key: self._client.dump(key) for key in self._client.scan_iter()}

    def restore(self) -> None:
        self._client.flushall()
        for key, value in self._kept.items():
            self._client.restore(key, 0, value)


class OldFile:
    """Redis' files as they were, to restart it with them."""

    def __init__(self, servers: Servers) -> None:
        self._valkey = servers.valkey
        self._data = servers.valkey._data
        self._kept = self._data.with_name("kept")
        self._valkey.stop()
        shutil.copytree(self._data, self._kept)
        self._valkey.start()

    def restore(self) -> None:
        self._valkey.kill()
        for path in self._data.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self._kept, self._data, dirs_exist_ok=True)
        for path in (self._data, *self._data.rglob("*")):
            shutil.chown(path, *_owner(self._data))
        self._valkey.start()


def _owner(path: Any) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def lost_steps(saver: Recording) -> list[int]:
    (event,) = saver.named("checkpoint.lost")
    assert (event.severity, event.error_type, event.outcome) == ("critical", "checkpoint_lost", "lost")
    assert event.user_notice
    assert event.checkpoint_count == len(event.context["checkpoint_ids"])
    return list(event.context["steps"])


def test_the_next_put_notices_a_redis_that_came_back_empty(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(2))
    saver.flush()
    parent = put_chain(saver, "t", range(2, 5), parent, big=["x" * 100])
    empty(saver)
    put(saver, "t", 5, parent, big=["x" * 100])
    assert lost_steps(saver) == [2, 3, 4]
    assert saver.named("checkpoint.lost")[0].lost_from_step == 2
    assert saver.flush()
    newest, *older = stock_tuples(own_servers.postgres_uri)
    assert [t.metadata["step"] for t in older] == [1, 0]
    # Not only what changed: the unchanged channel was in the lost checkpoints alone.
    assert newest.checkpoint["channel_values"] == {"step": [5], "big": ["x" * 100]}


def test_the_next_pending_writes_notice_it_too(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    at = put(saver, "t", 0)
    saver.put_writes(at, [("a", 1)], "task1")
    empty(saver)
    saver.put_writes(at, [("a", 2)], "task2")
    assert lost_steps(saver) == [0]
    assert saver.named("checkpoint.lost")[0].context["tasks"] == ["task1"]


def test_the_next_read_notices_it_and_answers_with_what_is_left(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(2))
    saver.flush()
    put(saver, "t", 2, parent)
    empty(saver)
    assert saver.get_tuple(config()).metadata["step"] == 1
    assert lost_steps(saver) == [2]
    assert saver.get_tuple(config()).metadata["step"] == 1
    assert len(saver.named("checkpoint.lost")) == 1, "it is said once"


def test_the_next_read_notices_it_also_after_others_were_put(open_saver: Any) -> None:
    saver, other = (open_saver(triggers=NOTHING, partitions=1) for _ in range(2))
    put_chain(saver, "t", range(2))
    empty(saver)
    put_chain(other, "u", range(10))
    assert saver.get_tuple(config()) is None
    assert lost_steps(saver) == [0, 1]


def test_a_flush_notices_what_an_old_file_lacks(open_saver: Any) -> None:
    saver = open_saver(triggers=NOTHING)
    parent = put(saver, "t", 0)
    old = OldKeys(saver)
    put_chain(saver, "t", range(1, 3), parent)
    old.restore()
    saver.flush()
    assert lost_steps(saver) == [1, 2]


def test_a_flush_notices_it_also_after_others_went_on_with_an_old_file(open_saver: Any) -> None:
    saver, other = (open_saver(triggers=NOTHING, partitions=1) for _ in range(2))
    parent = put(saver, "t", 0)
    old = OldKeys(saver)
    put_chain(saver, "t", range(1, 3), parent)
    old.restore()
    put(saver, "u", 0)  # with this the partition's number is as high as it was
    put_chain(other, "t", range(10, 13), parent)
    saver.flush()
    assert lost_steps(saver) == [1, 2]


def test_records_that_vanish_from_a_thread_are_told_by_whoever_flushes_it(open_saver: Any) -> None:
    saver, worker = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    put_chain(saver, "t", range(2))
    client, keys = saver._core.redis.client(), saver._core.commands.layout.thread("t")
    client.hdel(keys.dirty, *(name for name in client.hkeys(keys.dirty) if name.startswith(b"c")))
    worker.flush()
    (event,) = worker.named("checkpoint.lost")
    assert (event.severity, event.outcome, event.checkpoint_count) == ("critical", "lost", 2)


def test_the_flusher_notices_it_by_itself(open_saver: Any) -> None:
    saver = open_saver(triggers=frozenset({"age"}), flush_age=30.0)
    put_chain(saver, "t", range(3))
    empty(saver)
    saver._core.ledger.debt("t").since -= 60
    saver._core.flusher._next_scan = 0.0
    saver._core.flusher.wake([])
    wait_until(lambda: saver.named("checkpoint.lost"))
    assert lost_steps(saver) == [0, 1, 2]
    assert not saver._core.ledger.records


def test_what_another_worker_has_flushed_is_not_called_lost(open_saver: Any) -> None:
    saver, worker = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(3))
    assert worker.flush()
    empty(saver)
    put(saver, "t", 3, parent)
    assert saver.flush()
    assert not saver.named("checkpoint.lost")


@pytest.mark.parametrize("flushed", [True, False])
def test_what_another_saver_has_deleted_is_not_called_lost(open_saver: Any, flushed: bool) -> None:
    saver, other = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    put_chain(saver, "t", range(3))
    other.delete_thread("t")
    if flushed:
        assert saver.flush()
    empty(saver)
    assert saver.get_tuple(config()) is None
    assert not saver.named("checkpoint.lost")


def test_other_savers_puts_do_not_hide_the_loss(open_saver: Any) -> None:
    """Their sequence numbers soon are higher than the lost ones."""
    saver, other = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(3))
    empty(saver)
    put_chain(other, "t", range(10, 30))
    put_chain(other, "u", range(30))
    assert other.flush()
    put(saver, "t", 3, parent)
    saver.flush()
    assert lost_steps(saver) == [0, 1, 2]


def test_a_late_acknowledgement_does_not_remove_what_came_after_redis_was_emptied(
    open_saver: Any, own_servers: Servers
) -> None:
    saver, other = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    put_chain(saver, "t", range(5))
    session = other._core.flusher._session
    acknowledge = session._acknowledge

    def after_a_restart(*args: Any) -> None:
        empty(saver)
        put(other, "t", 7)
        acknowledge(*args)

    session._acknowledge = after_a_restart
    other.flush("t")
    session._acknowledge = acknowledge
    assert other.flush("t")
    assert 7 in stock_steps(own_servers.postgres_uri)


def test_flushed_is_not_said_of_what_redis_has_forgotten_before_the_flush(open_saver: Any) -> None:
    saver = open_saver(triggers=NOTHING, ack="flushed")
    session = saver._core.flusher._session
    flush = session.flush

    def forgotten(*args: Any) -> None:
        empty(saver)
        flush(*args)

    session.flush = forgotten
    with pytest.raises(AcknowledgementError):
        put(saver, "t", 0)
    assert lost_steps(saver) == [0]


def test_numbers_are_not_used_twice_after_redis_was_emptied(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    put_chain(saver, "t", range(50))
    saver.flush()
    saver.delete_thread("t")  # whatever has a lower number than now is never flushed
    empty(saver)
    fresh = open_saver(triggers=NOTHING)
    put_chain(fresh, "t", range(2))
    assert fresh.flush()
    assert stock_steps(own_servers.postgres_uri) == [1, 0]


def test_a_redis_restored_from_an_old_file_replaces_nothing_that_is_newer(
    open_saver: Any, own_servers: Servers
) -> None:
    saver = open_saver(triggers=NOTHING)
    at = put(saver, "t", 0)
    saver.put_writes(at, [("__resume__", "old")], "task")
    checkpoint, metadata, new = saver.get_tuple(config()).checkpoint, {"step": 0, "revision": "old"}, {}
    saver.put(config(), checkpoint, metadata, new)
    old = OldFile(own_servers)
    wait_until(lambda: reachable(saver))
    saver.put_writes(at, [("__resume__", "new")], "task")
    saver.put(config(), checkpoint, {"step": 0, "revision": "new"}, new)
    assert saver.flush()
    put(saver, "t", 1, at)
    old.restore()
    wait_until(lambda: reachable(saver))
    found = saver.get_tuple(config())
    assert found.metadata["revision"] == "new"
    assert [value for _, _, value in found.pending_writes] == ["new"]
    assert lost_steps(saver) == [1]
    assert wait_until(saver.flush)
    (stored,) = stock_tuples(own_servers.postgres_uri)
    assert stored.metadata["revision"] == "new"
    assert [value for _, _, value in stored.pending_writes] == ["new"]


def test_records_from_an_old_file_are_known_also_after_others_were_put(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING, partitions=1)
    put(saver, "t", 0)
    again = saver.get_tuple(config())
    saver.put(config(), again.checkpoint, {"step": 0, "revision": "old"}, {})
    old = OldKeys(saver)
    saver.put(config(), again.checkpoint, {"step": 0, "revision": "new"}, {})
    assert saver.flush()
    old.restore()
    put(saver, "u", 0)  # from now on the partition's number is not lower than what Postgres has seen
    assert saver.flush()
    (stored,) = stock_tuples(own_servers.postgres_uri)
    assert stored.metadata["revision"] == "new"


def test_a_clean_head_from_an_old_file_is_not_believed_even_without_verification(
    open_saver: Any, own_servers: Servers
) -> None:
    saver = open_saver(triggers=NOTHING, verify_reads=False)
    parent = put(saver, "t", 0)
    saver.flush()
    old = OldFile(own_servers)
    wait_until(lambda: reachable(saver))
    put(saver, "t", 1, parent)
    saver.flush()
    old.restore()
    wait_until(lambda: reachable(saver))
    assert saver.get_tuple(config()).metadata["step"] == 1
    put(saver, "another", 0)
    fresh = open_saver(triggers=NOTHING, verify_reads=False)
    assert fresh.get_tuple(config()).metadata["step"] == 1


def test_a_fresh_process_is_not_misled_by_a_redis_that_went_back(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(3))
    saver.flush()
    empty(saver)
    fresh = open_saver(triggers=NOTHING)
    put(fresh, "t", 3, parent)
    assert fresh.get_tuple(config()).metadata["step"] == 3
    assert fresh.flush()
    assert stock_steps(own_servers.postgres_uri) == [3, 2, 1, 0]
    with psycopg.connect(own_servers.postgres_uri) as conn:
        row = conn.execute("SELECT max(sequence) FROM checkpoint_buffer_partitions").fetchone()
    assert row is not None
    assert row[0] > 3


@pytest.mark.parametrize("knows_by", ["the put", "a read before it", "nothing, Postgres is away"])
def test_a_process_that_finds_a_thread_open_puts_all_its_values(
    open_saver: Any, own_servers: Servers, knows_by: str
) -> None:
    """Redis may have forgotten what the others have put, the unchanged channels with it."""
    saver, fresh = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(3), big=["x"])
    empty(saver)
    if knows_by == "a read before it":
        assert fresh.get_tuple(config(__pregel_runtime=None)) is None
    if knows_by == "nothing, Postgres is away":
        own_servers.postgres.kill()
    put(fresh, "t", 3, parent, big=["x"])
    own_servers.postgres.start()
    assert wait_until(fresh.flush, timeout=30)
    (stored,) = stock_tuples(own_servers.postgres_uri)
    assert stored.checkpoint["channel_values"] == {"step": [3], "big": ["x"]}


def test_a_process_that_has_seen_no_number_counts_on_after_the_first_flush(
    open_saver: Any, own_servers: Servers
) -> None:
    saver, other = (open_saver(triggers=NOTHING, partitions=1) for _ in range(2))
    put_chain(saver, "t", range(20))
    assert saver.flush()
    empty(saver)
    put(other, "u", 0)
    assert other.flush()
    again = other.get_tuple(config("u"))
    other.put(again.config, again.checkpoint, {"step": 0, "revision": 2}, {})
    assert other.flush()
    (stored,) = stock_tuples(own_servers.postgres_uri, "u")
    assert stored.metadata["revision"] == 2


def test_a_delta_channel_whose_latest_writes_are_only_in_redis_does_not_go_around_it(
    open_saver: Any, own_servers: Servers
) -> None:
    saver = open_saver(triggers=NOTHING)
    run = build_deltas(saver)
    run.invoke({"log": ["a"], "facts": {"a": 1}}, config("d"))
    state = saver.get_tuple(config("d"))
    own_servers.valkey.kill()
    with pytest.raises(CheckpointLostError, match="DeltaChannel"):
        saver.put(state.config, {**state.checkpoint, "id": state.checkpoint["id"] + "0"}, state.metadata, {})
    assert saver.named("put.failed")


def test_a_delta_channel_whose_writes_are_lost_is_refused_rather_than_wrong(open_saver: Any) -> None:
    saver = open_saver(triggers=NOTHING)
    run = build_deltas(saver)
    run.invoke({"log": ["a"], "facts": {"a": 1}}, config("d"))
    saver.flush()
    run.update_state(config("d"), {"log": ["b"]})
    state = saver.get_tuple(config("d"))
    empty(saver)
    with pytest.raises(CheckpointLostError, match="DeltaChannel"):
        saver.put(state.config, {**state.checkpoint, "id": state.checkpoint["id"] + "0"}, state.metadata, {})
    assert saver.named("checkpoint.lost")
    assert saver.named("put.failed")
    # It goes on from what is left.
    run.update_state(config("d"), {"log": ["c"]})
    assert saver.flush()


def test_a_run_goes_on_after_redis_was_emptied_in_the_middle(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver()
    run = graph(saver, lambda: None, lambda: empty(saver), lambda: None)
    result = run.invoke({"xs": [], "big": ["x"]}, config("r"), durability="sync")
    assert result["xs"] == [0, 1, 2]
    wait_until(lambda: not saver._core.ledger.records)
    newest = stock_tuples(own_servers.postgres_uri, "r")[0]
    assert newest.checkpoint["channel_values"]["xs"] == [0, 1, 2]
    assert newest.checkpoint["channel_values"]["big"] == ["x"]


def test_a_new_life_is_not_taken_for_the_deleted_one_by_a_process_that_has_seen_no_number(
    open_saver: Any, own_servers: Servers
) -> None:
    other = open_saver(triggers=NOTHING)  # before anything was put
    saver = open_saver(triggers=NOTHING)
    put_chain(saver, "t", range(50))
    saver.delete_thread("t")
    empty(saver)
    put_chain(other, "t", range(3))
    assert other.flush()
    assert stock_steps(own_servers.postgres_uri) == [2, 1, 0]


def test_what_is_put_again_after_redis_was_emptied_replaces_what_was_flushed_before(
    open_saver: Any, own_servers: Servers
) -> None:
    other = open_saver(triggers=NOTHING)  # before anything was put
    saver = open_saver(triggers=NOTHING)
    at = put_chain(saver, "t", range(5))
    assert saver.flush()
    found = saver.get_tuple(at)
    empty(saver)
    other.put(found.parent_config, found.checkpoint, {**found.metadata, "revision": 2}, {})
    assert other.flush()
    assert stock_tuples(own_servers.postgres_uri)[0].metadata["revision"] == 2
