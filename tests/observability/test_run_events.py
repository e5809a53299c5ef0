"""Who watches a thread gets its events as they happen, whichever server is away."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from helpers import await_until

import observability
from checkpointer.errors import ConfigurationError
from checkpointer.events import CheckpointEvent, describe_error, uuid7
from checkpointer.hooks import HookContext, Hooks, load_hook
from observability import Observability
from observability.runs import _missed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from checkpointer.embedded import Servers


def notice(thread_id: str = "t", **facts: Any) -> CheckpointEvent:
    values: dict[str, Any] = {
        "name": "flush.failed",
        "severity": "critical",
        "error_type": "checkpoint_flush_error",
        "message": "the flush failed",
        "checkpoint_count": 2,
        "user_notice": True,
    }
    return CheckpointEvent(thread_id=thread_id, **(values | facts))


async def take(subscription: Any, count: int) -> list[dict[str, Any]]:
    return [await asyncio.wait_for(anext(subscription), 15) for _ in range(count)]


@asynccontextmanager
async def another_process(context: HookContext) -> AsyncIterator[Observability]:
    """A second object for the same target: it shares nothing with the first but the servers."""
    other = Observability(context)
    try:
        yield other
    finally:
        await asyncio.to_thread(other.close, 5)


async def broadcast(target: Observability, *events: Any) -> None:
    for event in events:
        observability.broadcast_run_event(event, observability=target)
    assert await asyncio.to_thread(target.flush, 15)


async def test_a_watcher_in_another_process_gets_events_live_and_once(
    context: HookContext, target: Observability
) -> None:
    async with (
        another_process(context) as other,
        observability.subscribe_run_events("t", observability=other) as watched,
    ):
        events = [notice() for _ in range(5)]
        await broadcast(target, notice("another thread"), *events)
        views = await take(watched, 5)
        assert [view["event_id"] for view in views] == [str(event.event_id) for event in events]
        assert views[0] == {
            "type": "checkpoint_flush_error",
            "severity": "critical",
            "message": "This conversation could not be saved to permanent storage yet. It is buffered.",
            "thread_id": "t",
            "timestamp": events[0].occurred_at.isoformat(),
            "event_id": str(events[0].event_id),
            "checkpoint_count": 2,
        }
        # Each comes by the ring and as a notification; what is only information comes by the ring alone, so
        # behind the second copies.
        last = notice(severity="info")
        await broadcast(target, last)
        assert [view["event_id"] for view in await take(watched, 1)] == [str(last.event_id)]


async def test_a_watcher_gets_nothing_from_before_it_watched(target: Observability) -> None:
    await broadcast(target, notice())
    async with observability.subscribe_run_events("t", observability=target) as watched:
        new = notice()
        await broadcast(target, new)
        assert (await take(watched, 1))[0]["event_id"] == str(new.event_id)


async def test_who_reconnects_gets_what_it_missed(context: HookContext, target: Observability) -> None:
    events = [notice() for _ in range(6)]
    await broadcast(target, *events[:5])
    seen = str(events[1].event_id)
    async with (
        another_process(context) as other,
        observability.subscribe_run_events("t", last_event_id=seen, observability=other) as watched,
    ):
        await broadcast(target, events[5])
        assert [view["event_id"] for view in await take(watched, 4)] == [str(e.event_id) for e in events[2:]]


async def test_an_id_older_than_the_ring_is_answered_with_a_reset(target: Observability) -> None:
    old = "01900000-0000-7000-8000-000000000000"  # of 2024
    events = [notice() for _ in range(300)]
    await broadcast(target, *events)
    async with observability.subscribe_run_events("t", last_event_id=old, observability=target) as watched:
        views = await take(watched, 257)
    assert views[0] == {"type": "reset"}
    assert [view["event_id"] for view in views[1:]] == [str(event.event_id) for event in events[-256:]]


async def test_an_id_that_the_ring_never_had_is_placed_by_its_time(target: Observability) -> None:
    first = notice()
    await broadcast(target, first)
    await asyncio.sleep(0.005)  # identifiers sort by milliseconds
    seen_elsewhere = str(uuid7())
    await asyncio.sleep(0.005)
    second = notice()
    await broadcast(target, second)
    async with observability.subscribe_run_events("t", last_event_id=seen_elsewhere, observability=target) as watched:
        assert [view["event_id"] for view in await take(watched, 1)] == [str(second.event_id)]


def test_an_id_of_the_same_millisecond_hides_nothing() -> None:
    def view(millisecond: int, rest: str) -> dict[str, Any]:
        return {"event_id": f"01900000-{millisecond:04x}-7000-8000-{rest * 12}"}

    ring = [view(1, "5"), view(2, "1"), view(2, "9"), view(3, "5")]
    assert _missed(ring, view(2, "5")["event_id"]) == ring[1:]
    assert _missed(ring, view(1, "9")["event_id"]) == [{"type": "reset"}, *ring]
    assert _missed(ring, view(2, "1")["event_id"]) == ring[2:]


async def test_with_redis_away_watchers_here_and_elsewhere_get_notices(
    own_servers: Servers, own_context: HookContext, own_target: Observability
) -> None:
    async with (
        another_process(own_context) as other,
        observability.subscribe_run_events("t", observability=own_target) as here,
        observability.subscribe_run_events("t", observability=other) as elsewhere,
    ):
        own_servers.valkey.kill()
        events = [notice(), notice(name="flush.recovered", severity="info", outcome="recovered")]
        await broadcast(own_target, *events)
        ids = [str(event.event_id) for event in events]
        assert [view["event_id"] for view in await take(here, 2)] == ids
        assert [view["event_id"] for view in await take(elsewhere, 2)] == ids
        own_servers.valkey.start()
        back = notice()
        await broadcast(own_target, back)
        assert [view["event_id"] for view in await take(here, 1)] == [str(back.event_id)]
        assert [view["event_id"] for view in await take(elsewhere, 1)] == [str(back.event_id)]


async def test_with_postgres_away_watchers_elsewhere_get_notices(
    own_servers: Servers, own_context: HookContext, own_target: Observability
) -> None:
    async with another_process(own_context) as other:
        own_servers.postgres.kill()
        async with observability.subscribe_run_events("t", observability=other) as elsewhere:
            event = notice()
            await broadcast(own_target, event)
            assert [view["event_id"] for view in await take(elsewhere, 1)] == [str(event.event_id)]


async def test_with_both_away_watchers_here_get_notices(
    own_servers: Servers, own_context: HookContext, own_target: Observability
) -> None:
    own_servers.postgres.kill()
    own_servers.valkey.kill()
    async with observability.subscribe_run_events("t", last_event_id=str(uuid7()), observability=own_target) as here:
        event = notice()
        await broadcast(own_target, event)
        views = await take(here, 2)
        assert views[0] == {"type": "reset"}
        assert views[1]["event_id"] == str(event.event_id)


async def test_the_hook_of_another_process_reaches_a_watcher_here(
    context: HookContext, target: Observability, migrated_uri: str, redis_url: str
) -> None:
    program = """
import sys, psycopg, redis
from checkpointer.events import CheckpointEvent
from checkpointer.hooks import HookContext, Hooks, load_hook
uri, url, prefix = sys.argv[1:]
context = HookContext(
    lambda: psycopg.connect(uri, autocommit=True), lambda: redis.Redis.from_url(url), prefix, prefix
)
hooks = Hooks()
for name in ("console", "thread_log", "run_events", "system_errors"):
    hooks.add(load_hook(name, context), name=name)
facts = dict(name="put.failed", severity="critical", error_type="checkpoint_lost", message="m", thread_id="t")
hooks.emit(CheckpointEvent(**facts))
hooks.emit(CheckpointEvent(**facts, user_notice=True, lost_from_step=3, outcome="lost"))
hooks.close(10)
assert all(stats.delivered == 2 for stats in hooks.stats().values()), hooks.stats()
"""
    async with observability.subscribe_run_events("t", observability=target) as watched:
        await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", program, migrated_uri, redis_url, context.prefix],
            check=True,
            timeout=60,
        )
        (view,) = await take(watched, 1)
    assert (view["lost_from_step"], view["outcome"]) == (3, "lost")
    assert view["message"] == "This conversation can no longer be saved. Steps 3 onward are not saved."
    (line,) = observability.read_thread_log("t", observability=target)
    assert (line["message"], line["level"]) == (view["message"], "critical")


async def test_an_event_of_the_application_arrives_with_what_it_lacks_added(target: Observability) -> None:
    async with observability.subscribe_run_events("t", observability=target) as watched:
        big = {"thread_id": "t", "type": "mine", "password": "x", "nan": float("nan"), "text": "y" * 3_000}
        await broadcast(target, big)
        (view,) = await take(watched, 1)
        assert view["type"] == "mine"
        assert view["password"] == "[scrubbed]"
        assert view["nan"] is None
        assert {"event_id", "timestamp"} <= set(view)
    with pytest.raises(ConfigurationError):
        observability.broadcast_run_event({"type": "mine"}, observability=target)


async def test_a_view_too_big_for_a_notification_is_announced(
    own_servers: Servers, own_context: HookContext, own_target: Observability
) -> None:
    async with (
        another_process(own_context) as other,
        observability.subscribe_run_events("t", observability=other) as elsewhere,
    ):
        own_servers.valkey.kill()
        big = {"thread_id": "t", "type": "mine", **{str(n): "y" * 3_000 for n in range(5)}}
        await broadcast(own_target, big)
        (view,) = await take(elsewhere, 1)
        assert view["type"] == "mine"
        assert view["shortened"] is True


async def test_crafted_thread_ids_reach_no_other_thread(context: HookContext, target: Observability) -> None:
    ids = ["t", "t:x", "T" * 3_001, "t\ufffd", "t?", "t\0", "{t}", "*", "log:t", "t\ud800", "T" * 3_000]
    async with another_process(context) as other:
        watchers = [observability.subscribe_run_events(one, observability=other) for one in ids]
        for watcher in watchers:
            await watcher.__aenter__()
        events = [notice(one) for one in ids]
        await broadcast(target, *events)
        for watcher, event in zip(watchers, events, strict=True):
            assert [view["event_id"] for view in await take(watcher, 1)] == [str(event.event_id)]
        assert all(watcher._queue.empty() for watcher in watchers)


async def test_a_subscription_ends_when_it_or_the_target_is_closed(context: HookContext) -> None:
    target = Observability(context)
    first = target.runs.subscribe("t")
    second = target.runs.subscribe("t")
    await first.aclose()
    assert [view async for view in first] == []
    assert [view async for view in first] == []
    await asyncio.to_thread(target.close, 5)
    assert [view async for view in second] == []
    async with target.runs.subscribe("t") as late:
        assert [view async for view in late] == []


async def test_threads_follow_the_servers_only_while_someone_watches(target: Observability) -> None:
    subscription = target.runs.subscribe("t")
    assert {"ring", "notify"} <= set(target.runs._threads)
    del subscription
    gc.collect()
    await await_until(lambda: not target.runs._threads)
    async with target.runs.subscribe("t") as again:
        event = notice()
        await broadcast(target, event)
        assert (await take(again, 1))[0]["event_id"] == str(event.event_id)


async def test_a_slow_watcher_starts_over_instead_of_filling_the_memory(
    target: Observability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("observability.runs._QUEUE_EVENTS", 10)
    async with target.runs.subscribe("t") as watched:
        events = [notice() for _ in range(25)]
        await broadcast(target, *events)
        assert (await take(watched, 1))[0] == {"type": "reset"}


async def test_many_watchers_share_two_threads(target: Observability) -> None:
    before = threading.active_count()
    watchers = [target.runs.subscribe("t") for _ in range(50)]
    for watcher in watchers:
        await watcher.__aenter__()
    assert threading.active_count() <= before + 3
    event = notice()
    await broadcast(target, event)
    for watcher in watchers:
        assert (await take(watcher, 1))[0]["event_id"] == str(event.event_id)


async def test_users_never_see_the_text_of_an_exception(context: HookContext, target: Observability) -> None:
    secret = "postgresql://bob:hunter2@db.internal/app"
    event = notice(
        message=f"could not reach {secret}",
        error=describe_error(RuntimeError(secret)),
        context={"dsn": secret},
        operation=secret,
    )
    hooks = Hooks()
    hooks.add(load_hook("thread_log", context))
    hooks.add(load_hook("run_events", context))
    async with target.runs.subscribe("t") as watched:
        hooks.emit(event)
        hooks.emit(notice(user_notice=False))
        hooks.emit(notice(thread_id=None))
        assert await asyncio.to_thread(hooks.flush, 15)
        views = await take(watched, 1)
    await asyncio.to_thread(hooks.close, 5)
    lines = await observability.aread_thread_log("t", observability=target)
    assert len(lines) == 1
    for word in ("bob", "hunter2", "internal", "RuntimeError", "Traceback"):
        assert word not in json.dumps([views, lines])
