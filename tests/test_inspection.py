"""What an operator is told of threads from outside of the application is what both servers have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers import wait_until
from poisoning import put_step
from savers import NOTHING, Recording, config, put, put_chain

from checkpointer import whereabouts
from checkpointer.errors import InvalidConfigError, StoreUnavailableError, UnknownDeadLetterError
from checkpointer.inspection import Inspector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg

    from checkpointer.embedded import Servers

    Connection = psycopg.Connection[Any]


@pytest.fixture
def inspector(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[Inspector]:
    found = Inspector(postgres_uri, redis_url, prefix=prefix)
    yield found
    found.close()
    found.close()


def ids_of(saver: Any, thread: str) -> list[str]:
    return [found.checkpoint["id"] for found in saver.list(config(thread))]


def test_a_timeline_says_where_each_checkpoint_lives(make: Callable[..., Recording], inspector: Inspector) -> None:
    saver = make()
    last = put_chain(saver, "t", range(3), big=["x" * 1000])
    saver.flush()
    last = put_chain(saver, "t", range(3, 5), last, big=["x" * 1000])
    saver.put_writes(last, [("xs", [1]), ("xs", [2])], "task")
    entries = inspector.timeline("t").entries
    assert [(entry.step, entry.in_postgres, entry.in_redis) for entry in entries] == [
        (4, False, "waiting"),
        (3, False, "waiting"),
        (2, True, "no"),
        (1, True, "no"),
        (0, True, "no"),
    ]
    assert [entry.source for entry in entries] == ["loop"] * 5
    # The big value lies in Postgres, whoever needs it.
    assert all(1_000 < entry.bytes < 2_500 for entry in entries)
    assert (entries[0].writes, entries[0].writes_waiting) == (0, 2)
    assert [entry.parent_id for entry in entries[:-1]] == [entry.checkpoint_id for entry in entries[1:]]
    saver.flush()
    entries = inspector.timeline("t").entries
    assert [(entry.in_postgres, entry.in_redis) for entry in entries] == [(True, "cached")] + [(True, "no")] * 4
    assert (entries[0].writes, entries[0].writes_waiting) == (2, 0)


def test_pages_of_a_timeline_hold_every_checkpoint_once_whichever_server_has_it(
    make: Callable[..., Recording], inspector: Inspector
) -> None:
    saver = make()
    last = put_chain(saver, "t", range(10))
    saver.flush()
    put_chain(saver, "t", range(10, 17), last)
    seen: list[int | None] = []
    before: str | None = None
    while True:
        page = inspector.timeline("t", before=before, limit=3)
        assert len(page.entries) <= 3
        seen += [entry.step for entry in page.entries]
        before = page.next_before
        if before is None:
            break
    assert seen == list(range(16, -1, -1))


def test_namespaces_have_timelines_of_their_own(make: Callable[..., Recording], inspector: Inspector) -> None:
    saver = make()
    put_chain(saver, "t", range(2))
    put_chain(saver, "t", range(3), config("t", checkpoint_ns="inner:1"))
    saver.flush()
    assert inspector.namespaces("t") == ["", "inner:1"]
    assert len(inspector.timeline("t").entries) == 2
    assert [entry.step for entry in inspector.timeline("t", "inner:1").entries] == [2, 1, 0]


def test_two_checkpoints_are_compared_by_channel(make: Callable[..., Recording], inspector: Inspector) -> None:
    saver = make()
    first = put(saver, "t", 0, same=["s"], gone=[1])
    second = saver.put(
        first,
        {
            **saver.get_tuple(first).checkpoint,
            "id": "ffffffff-ffff-6fff-bfff-ffffffffffff",
            "channel_values": {"step": [1], "same": ["s"], "new": {"a": "needle"}},
            "channel_versions": {"step": "2", "same": "00000000.1", "new": "1"},
        },
        {"source": "loop", "step": 1},
        {"step": "2", "new": "1"},
    )
    ids = [found["configurable"]["checkpoint_id"] for found in (first, second)]
    for _ in range(2):  # from Redis, then from Postgres
        changes = inspector.compare("t", "", *ids, content=True)
        assert changes is not None
        assert {change.channel: change.kind for change in changes} == {
            "gone": "removed",
            "new": "added",
            "same": "same",
            "step": "changed",
        }
        assert '"needle"' in str({change.channel: change.after for change in changes}["new"])
        bare = inspector.compare("t", "", *ids, content=False)
        assert bare is not None
        assert [change.kind for change in bare] == [change.kind for change in changes]
        assert all(change.before is None and change.after is None for change in bare)
        saver.flush()
    assert inspector.compare("t", "", ids[0], "00000000-0000-6000-8000-000000000000", content=True) is None


def test_looking_at_a_thread_opens_and_changes_nothing(
    make: Callable[..., Recording], inspector: Inspector, conn: Connection
) -> None:
    saver = make()
    put_chain(saver, "t", range(2))
    saver.flush()
    conn.execute("DELETE FROM checkpoint_buffer_threads")
    ids = ids_of(saver, "t")
    conn.execute("DELETE FROM checkpoint_buffer_threads")
    inspector.timeline("t")
    inspector.thread("t")
    inspector.threads()
    inspector.compare("t", "", ids[1], ids[0], content=True)
    assert conn.execute("SELECT count(*) FROM checkpoint_buffer_threads").fetchone() == (0,)


def test_a_search_looks_through_so_many_threads_and_goes_on(
    make: Callable[..., Recording], inspector: Inspector, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = make()
    for number in range(12):
        put(saver, f"thread-{number:02}{'-NEEDLE' if number in (1, 8, 9) else ''}", 0)
        if number % 2:
            saver.flush()
    monkeypatch.setattr(whereabouts, "SEARCHED", 5)
    found: list[list[str]] = []
    after: str | None = None
    while True:
        page = inspector.threads(text="needle", after=after, limit=2)
        found.append([thread.thread_id for thread in page.threads])
        after = page.next_after
        if after is None:
            break
    assert found == [["thread-01-NEEDLE"], ["thread-08-NEEDLE", "thread-09-NEEDLE"], []]


def test_how_it_stands_is_told_of_each_server_by_itself(own_servers: Servers) -> None:
    with Recording(own_servers.postgres_uri, own_servers.redis_url, triggers=NOTHING, hooks=()) as saver:
        inspector = Inspector(own_servers.postgres_uri, own_servers.redis_url)
        store = inspector.in_postgres()
        assert store.trouble is not None
        assert "migrate" in store.trouble
        saver.setup()
        put_chain(saver, "t", range(3))
        put_chain(saver, "u", range(1))

        def waiting() -> int | None:
            backlog = inspector.in_redis().backlog
            return backlog and backlog.records

        # A record for each checkpoint and for each new version of a channel.
        assert wait_until(waiting) == 8
        store, redis = inspector.in_postgres(), inspector.in_redis()
        assert redis.backlog is not None
        assert (store.trouble, store.is_known, store.open_threads, store.dead_letters) == (None, True, 2, 0)
        assert (redis.trouble, redis.backlog.threads) == (None, 2)
        assert redis.backlog.oldest_seconds > 0
        own_servers.postgres.kill()
        assert inspector.in_postgres().trouble == "Postgres cannot be reached: try again later."
        redis = inspector.in_redis()
        assert redis.backlog is not None
        assert redis.backlog.records == 8
        with pytest.raises(StoreUnavailableError):
            inspector.threads()
        own_servers.postgres.start()
        wait_until(lambda: inspector.in_postgres().trouble is None)
        own_servers.valkey.kill()
        wait_until(lambda: inspector.in_redis().trouble == "Redis cannot be reached.")
        assert inspector.in_redis().backlog is None
        assert inspector.threads().redis_trouble is not None
        assert [entry.in_redis for entry in inspector.timeline("t").entries] == []
        own_servers.valkey.start()
        wait_until(lambda: inspector.in_redis().backlog is not None)
        inspector.close()


def test_ids_that_cannot_be_are_refused(inspector: Inspector, make: Callable[..., Recording]) -> None:
    make()
    for bad in ("a\0b", "\ud800"):
        for ask in (inspector.thread, inspector.timeline, inspector.namespaces):
            with pytest.raises(InvalidConfigError):
                ask(bad)
    with pytest.raises(InvalidConfigError):
        inspector.threads(after="a\0b")
    with pytest.raises(UnknownDeadLetterError):
        inspector.dead_letter(7, content=False)


def test_a_record_that_cannot_be_read_is_shown_for_what_is_known(
    make: Callable[..., Recording], inspector: Inspector
) -> None:
    saver = make()
    checkpoint_id = put_step(saver, "t", 0)
    keys = saver._core.commands.layout.thread("t")
    with saver._core.redis.dedicated() as client:
        client.hset(keys.dirty, f"c\0\0{checkpoint_id}", b"rubbish")
    (entry,) = inspector.timeline("t").entries
    assert (entry.checkpoint_id, entry.step, entry.in_redis) == (checkpoint_id, None, "waiting")
    assert entry.at is not None
