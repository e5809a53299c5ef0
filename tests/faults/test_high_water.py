"""The buffer is bounded: above its marks puts slow down and then wait for Postgres, and nothing is dropped."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import wait_until
from savers import NOTHING, put, put_chain, stock_steps

from checkpointer.options import BufferOptions
from checkpointer.steps import Flushed, Pause
from checkpointer.watermarks import WaterMarks

if TYPE_CHECKING:
    from checkpointer.embedded import Servers
    from checkpointer.events import CheckpointEvent

KILOBYTE = ["x" * 1000]


def held_bytes(saver: Any) -> int:
    layout = saver._core.commands.layout
    client = saver._core.redis.client()
    return sum(int(client.hget(layout.state(p), "bytes") or 0) for p in range(layout.partitions))


def real_bytes(saver: Any, *threads: str) -> int:
    client, layout = saver._core.redis.client(), saver._core.commands.layout
    return sum(len(value) for t in threads for value in client.hvals(layout.thread(t).dirty))


def test_the_count_of_waiting_bytes_is_exact(open_saver: Any) -> None:
    saver = open_saver(triggers=NOTHING)
    at = put_chain(saver, "t", range(3), big=KILOBYTE)
    put(saver, "u", 0, big=KILOBYTE * 5)
    saver.put_writes(at, [("a", 1), ("b", 2)], "task")
    saver.put_writes(at, [("__resume__", 1)], "task")
    saver.put_writes(at, [("__resume__", "something longer")], "task")
    assert held_bytes(saver) == real_bytes(saver, "t", "u") > 6_000
    saver.flush("t")
    assert held_bytes(saver) == real_bytes(saver, "u") > 5_000
    saver.delete_thread("u")
    assert held_bytes(saver) == 0


def note_waits(saver: Any) -> list[Any]:
    """Return a list of what puts wait for from now on: pauses and flushes."""
    do, waits = saver._do, []

    def noting(step: Any) -> Any:
        if isinstance(step, Pause | Flushed):
            waits.append(step)
        return do(step)

    saver._do = noting
    return waits


def test_above_the_mark_puts_wait_until_postgres_has_them(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING, high_water_bytes=40_000)
    waits = note_waits(saver)
    parent = None
    for step in range(60):
        parent = put(saver, "t", step, parent, big=[str(step) * 500])
        assert held_bytes(saver) <= 40_000
    (high,) = saver.named("buffer.high")[:1]
    assert high.context["high_water_bytes"] == 40_000
    assert any(isinstance(wait, Pause) for wait in waits)
    put(saver, "u", 0, big=KILOBYTE * 20)
    assert any(isinstance(wait, Flushed) and wait.thread_id == "u" for wait in waits)
    assert stock_steps(own_servers.postgres_uri, "u") == [0]
    assert saver.flush()
    assert len(stock_steps(own_servers.postgres_uri)) == 60


def test_while_postgres_is_away_nothing_is_slowed_down_and_all_is_kept(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING, high_water_bytes=5_000)
    parent = put(saver, "t", 0)
    own_servers.postgres.kill()
    assert not saver.flush()
    waits = note_waits(saver)
    parent = put_chain(saver, "t", range(1, 60), parent, big=KILOBYTE)
    assert not waits
    assert saver.named("buffer.high")
    assert saver._core.postgres_tier.is_down
    own_servers.postgres.start()
    assert wait_until(saver.flush, timeout=30)
    assert len(stock_steps(own_servers.postgres_uri)) == 60


def test_old_records_count_as_too_many_and_it_ends_below_the_low_mark(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=frozenset({"age"}), flush_age=0.1, high_water_age=0.3, postgres_timeout=0.2)
    with psycopg.connect(own_servers.postgres_uri) as other:
        other.execute("SELECT 1 FROM checkpoint_buffer_partitions FOR UPDATE")
        parent = put(saver, "t", 0)
        wait_until(lambda: saver.named("buffer.high"))
        put_chain(saver, "t", range(1, 3), parent)
    wait_until(lambda: saver.named("buffer.normal"))
    wait_until(lambda: len(stock_steps(own_servers.postgres_uri)) == 3)


def test_a_thread_that_is_always_dirty_does_not_look_old_for_ever(open_saver: Any) -> None:
    saver = open_saver(triggers=NOTHING)
    session = saver._core.flusher._session
    parent = put(saver, "t", 0)
    drain = session._drain

    def put_after_the_drain(*args: Any) -> None:
        nonlocal parent
        drain(*args)
        parent = put(saver, "t", 1, parent)

    session._drain = put_after_the_drain
    key = saver._core.commands.layout.threads(saver._core.commands.layout.partition_of("t"))
    client = saver._core.redis.client()
    client.zadd(key, {"t": client.zscore(key, "t") - 30_000})  # ms
    before = client.zscore(key, "t")
    saver.flush("t")
    session._drain = drain
    assert client.zscore(key, "t") > before + 20_000


@pytest.mark.parametrize("limit", [1, 3])
def test_memory_that_runs_out_in_the_middle_drains_and_recovers(
    open_saver: Any, own_servers: Servers, limit: int
) -> None:
    saver = open_saver(triggers=frozenset({"age", "size"}), flush_age=0.1, flush_size=50)
    client = saver._core.redis.client()
    used = client.info("memory")["used_memory"]
    client.config_set("maxmemory", used + limit * 100_000)
    errors: list[Exception] = []

    def work(thread: str) -> None:
        try:
            put_chain(saver, thread, range(40), big=["x" * 20_000])
        except Exception as exc:  # noqa: BLE001 - whatever it is, the test fails with it
            errors.append(exc)

    workers = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    client.config_set("maxmemory", 0)
    assert wait_until(saver.flush, timeout=30)
    for i in range(4):
        assert stock_steps(own_servers.postgres_uri, f"t{i}") == list(range(39, -1, -1))
    assert wait_until(lambda: _put_into_the_buffer(saver))


def _put_into_the_buffer(saver: Any) -> bool:
    put(saver, "after", 0)
    return bool(saver._core.redis.client().exists(saver._core.commands.layout.thread("after").dirty))


def test_the_pressure_of_the_fullest_partition_and_of_all_together() -> None:
    events: list[CheckpointEvent] = []
    marks = WaterMarks(BufferOptions(high_water_bytes=1000, high_water_age=10.0), events.append)
    marks.note(0, 200, 0.0)
    assert not marks.is_high
    marks.note(0, 250, 0.0)  # a partition's share is a quarter
    assert marks.is_high
    assert marks.pause() > 0
    assert not marks.goes_through()
    marks.scanned({0: (210, 0.0)})
    assert marks.is_high, "between the marks nothing changes"
    marks.scanned({0: (190, 0.0)})
    assert not marks.is_high
    marks.scanned(dict.fromkeys(range(5), (200, 0.0)))
    assert marks.is_high
    marks.scanned({0: (0, 15.0)})
    assert marks.goes_through()
    marks.scanned({})
    assert (marks.is_high, marks.pause(), marks.goes_through()) == (False, 0.0, False)
    assert [event.name for event in events] == ["buffer.high", "buffer.normal"] * 2
