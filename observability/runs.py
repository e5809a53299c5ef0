"""Events of a run, as they happen, for those who watch its thread.

A *view* is the dict that a watcher gets. It takes three ways at once: to watchers in this process directly;
through a Redis stream per thread, the *ring*, which also serves those who reconnect; and through Postgres
NOTIFY, which still works when Redis is what failed. Watchers drop what they have had, by `event_id`. Not
here: what a user may see (`projections.py`) and how it gets to a browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
import time
import weakref
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

import psycopg

from checkpointer.hooks import renew_in_child
from observability.links import AwayError, RedisLink, RowRefusedError, deadline
from observability.scrub import safe_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import redis

    from checkpointer.hooks import HookContext
    from observability.links import PostgresLink

View = dict[str, Any]

_RING_EVENTS = 256
_RING_SECONDS = 600
_FIELD = b"event"
_NOTIFY_BYTES = 7_000
_NOTIFY_KEYS = ("type", "severity", "thread_id", "timestamp", "event_id")

# Polled rather than waited for: XREAD cannot wait for keys on several nodes of a cluster.
_POLL_SECONDS = 0.1
_LISTEN_PAUSE = 0.5
_PROBE_SECONDS = 10.0
_PROBE_LIMIT = 3.0

_QUEUE_EVENTS = 1_000
_SEEN_EVENTS = 1_024

# The time in a UUID of version 7: 48 bits of milliseconds, and a hyphen.
_TIME_DIGITS = 13

RESET: View = {"type": "reset"}
"""Says that events between the last one seen and the next one may be missing."""


class RunEventSubscription:
    """An async iterator over the views of one thread; made by `RunEvents.subscribe`.

    It is subscribed from the moment it is made until `aclose()` or until it is no longer referenced. Under
    `async with` it is also sure to be connected before the block begins.
    """

    def __init__(self, thread_id: str, last_event_id: str | None, end: Callable[[RunEventSubscription], None]) -> None:
        self.thread_id = thread_id
        self.last_event_id = last_event_id
        self.begun_ms = int(time.time() * 1_000)
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[View | None] = asyncio.Queue()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._closed_ways = {"ring", "notify"}
        self._connected = asyncio.Event()
        # Views that came before the ring was read; they are newer than what is in it.
        self._early: list[View] | None = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> View:
        view = await self._queue.get()
        if view is not None:
            return view
        # For those who ask again.
        self._queue.put_nowait(None)
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        await self._connected.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the subscription; the iterator ends as well."""
        self._end(self)
        self._queue.put_nowait(None)

    def deliver(self, view: View | None) -> None:
        """Hand over a view, or None for the end, from any thread."""
        self._in_loop(self._take, view)

    def catch_up(self, ring: list[View] | None) -> None:
        """Hand over what the ring holds, oldest first; None if it could not be read."""
        self._in_loop(self._replay, ring)
        self.way_opened("ring")

    def way_opened(self, way: str) -> None:
        """Note that a way was tried: it is open, or will be when its server is back."""
        self._in_loop(self._open, way)

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(function, *args)

    def _open(self, way: str) -> None:
        self._closed_ways.discard(way)
        if not self._closed_ways:
            self._connected.set()

    def _take(self, view: View | None) -> None:
        if view is None:
            # The end: nobody has to wait for a connection any more.
            self._connected.set()
        elif self._early is not None:
            self._early.append(view)
            return
        elif view != RESET and self._is_known(str(view.get("event_id"))):
            return
        if self._queue.qsize() >= _QUEUE_EVENTS:
            # The watcher is too slow: it starts over rather than fill the memory.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._queue.put_nowait(dict(RESET))
        self._queue.put_nowait(view)

    def _is_known(self, event_id: str) -> bool:
        if event_id in self._seen:
            return True
        self._seen[event_id] = None
        if len(self._seen) > _SEEN_EVENTS:
            self._seen.popitem(last=False)
        return False

    def _replay(self, ring: list[View] | None) -> None:
        if self._early is None:
            return
        early, self._early = self._early, None
        for view in [*_missed(ring, self.last_event_id), *early]:
            self._take(view)
        # The thread that follows the ring may be behind, and bring once more what was before this watch.
        for view in ring or []:
            self._is_known(str(view.get("event_id")))


def _missed(ring: list[View] | None, last_event_id: str | None) -> list[View]:
    """Return what came after `last_event_id`, with RESET before it if something may be missing."""
    if last_event_id is None:
        return []
    if not ring:
        return [dict(RESET)]
    ids = [str(view.get("event_id")) for view in ring]
    if last_event_id in ids:
        return ring[ids.index(last_event_id) + 1 :]
    # It came while Redis was away: ids begin with their time, and the ring reaches back further than it.
    if _is_uuid(last_event_id) and last_event_id[:_TIME_DIGITS] > ids[0][:_TIME_DIGITS]:
        # Those of the same millisecond as well: rather once more than not at all.
        since = last_event_id[:_TIME_DIGITS]
        return [view for view, event_id in zip(ring, ids, strict=True) if event_id[:_TIME_DIGITS] >= since]
    return [dict(RESET), *ring]


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


class RunEvents:
    """Publishes views and feeds subscriptions.

    Two threads follow Redis and Postgres while there is a subscription, for all subscriptions together.

    Args:
        context: For the connections that the two threads wait on.
        postgres: To notify through.
        redis: To write the rings through.
    """

    def __init__(self, context: HookContext, postgres: PostgresLink, redis: RedisLink) -> None:
        self._context = context
        self._postgres = postgres
        self._redis = redis
        self._channel = "checkpointer_" + hashlib.sha256(context.prefix.encode()).hexdigest()[:16]
        self._closed = False
        self._renew()
        renew_in_child(self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._subscriptions: weakref.WeakSet[RunEventSubscription] = weakref.WeakSet()
        self._threads: dict[str, threading.Thread] = {}
        self._listening = False

    def publish(self, view: Mapping[str, Any]) -> None:
        """Send a view to everyone who watches its thread.

        Waits for the servers, and never raises for an outage.

        Args:
            view: JSON values, with at least `thread_id` and `event_id`.
        """
        sent = {**view, "thread_id": safe_name(view["thread_id"])}
        self._fan_out(sent)
        in_ring = self._to_ring(sent)
        if not in_ring or sent.get("severity") != "info":
            self._notify(sent)

    def subscribe(self, thread_id: str, last_event_id: str | None = None) -> RunEventSubscription:
        """Watch a thread, from a running event loop.

        Args:
            thread_id: The thread.
            last_event_id: The `event_id` of the last view seen: what came after it is delivered first, with
                a view `{"type": "reset"}` before it if something may be missing.
        """
        subscription = RunEventSubscription(safe_name(thread_id), last_event_id, self._unsubscribe)
        with self._lock:
            if self._closed:
                subscription.deliver(None)
                return subscription
            self._subscriptions.add(subscription)
            if self._listening:
                subscription.way_opened("notify")
            for name, follow in (("ring", self._follow_rings), ("notify", self._follow_notifications)):
                if name not in self._threads:
                    thread = threading.Thread(target=follow, name=f"checkpointer-{name}", daemon=True)
                    self._threads[name] = thread
                    thread.start()
        return subscription

    def close(self, timeout: float) -> None:
        """End all subscriptions and both threads."""
        with self._lock:
            self._closed = True
            threads = list(self._threads.values())
        self._stop.set()
        for subscription in self._current():
            subscription.catch_up(None)
            subscription.deliver(None)
        ends = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))

    def _unsubscribe(self, subscription: RunEventSubscription) -> None:
        with self._lock:
            self._subscriptions.discard(subscription)

    def _current(self) -> list[RunEventSubscription]:
        with self._lock:
            return list(self._subscriptions)

    def _fan_out(self, view: View) -> None:
        for subscription in self._current():
            if subscription.thread_id == view.get("thread_id"):
                subscription.deliver(view)

    def _key(self, thread_id: str) -> bytes:
        return f"{self._context.prefix}:ev:run:{thread_id}".encode()

    def _to_ring(self, view: View) -> bool:
        key, value = self._key(view["thread_id"]), json.dumps(view).encode()

        def append(client: redis.Redis) -> None:
            with client.pipeline(transaction=False) as pipeline:
                pipeline.xadd(key, {_FIELD: value}, maxlen=_RING_EVENTS, approximate=False)
                pipeline.expire(key, _RING_SECONDS)
                pipeline.execute()

        try:
            self._redis.run(append)
        except AwayError:
            return False
        return True

    def _notify(self, view: View) -> None:
        payload = json.dumps(view, ensure_ascii=False)
        if len(payload.encode()) > _NOTIFY_BYTES:
            short = {key: view[key] for key in _NOTIFY_KEYS if key in view}
            payload = json.dumps({**short, "shortened": True}, ensure_ascii=False)
        with contextlib.suppress(AwayError, RowRefusedError):
            self._postgres.run(
                lambda connection: connection.execute("SELECT pg_notify(%s, %s)", [self._channel, payload])
            )

    def _leave_if_idle(self, name: str) -> bool:
        """Whether nobody watches any more; the thread has to end then, since a new one may be started."""
        with self._lock:
            if self._subscriptions and not self._stop.is_set():
                return False
            self._threads.pop(name, None)
            return True

    def _follow_rings(self) -> None:
        link = RedisLink(self._context)
        # The last entry read of each ring, and the subscriptions that have been caught up.
        cursors: dict[bytes, bytes] = {}
        known: weakref.WeakSet[RunEventSubscription] = weakref.WeakSet()
        while not self._leave_if_idle("ring"):
            current = self._current()
            fresh = [one for one in current if one not in known]
            wanted = {self._key(one.thread_id): one.thread_id for one in current}
            cursors = {key: cursor for key, cursor in cursors.items() if key in wanted}
            try:
                for subscription in fresh:
                    key = self._key(subscription.thread_id)
                    ring = link.run(partial(_read_ring, key=key))
                    # Behind an earlier subscription's cursor: those views come again and are dropped.
                    cursors.setdefault(key, ring[-1][0] if ring else b"0-0")
                    known.add(subscription)
                    subscription.catch_up([view for _, view in ring])
                for key, stream_id, view in link.run(partial(_read_on, cursors=cursors)):
                    cursors[key] = stream_id
                    self._fan_out({**view, "thread_id": wanted[key]})
            except AwayError:
                for subscription in fresh:
                    if subscription not in known:
                        known.add(subscription)
                        cursors.setdefault(self._key(subscription.thread_id), f"{subscription.begun_ms}-0".encode())
                        subscription.catch_up(None)
            self._stop.wait(_POLL_SECONDS)
        link.close()

    def _follow_notifications(self) -> None:
        while not self._leave_if_idle("notify"):
            try:
                with contextlib.closing(self._context.connect_postgres()) as connection:
                    self._listen(connection)
            except (psycopg.Error, OSError):
                self._set_listening(False)
                self._stop.wait(_LISTEN_PAUSE)

    def _listen(self, connection: psycopg.Connection[Any]) -> None:
        # The channel is made of letters, digits and an underscore only.
        with deadline(connection, _PROBE_LIMIT):
            connection.execute(f"LISTEN {self._channel}".encode())
        self._set_listening(True)
        probe_at = time.monotonic() + _PROBE_SECONDS
        while self._current() and not self._stop.is_set():
            for notice in connection.notifies(timeout=_LISTEN_PAUSE):
                view = _parse(notice.payload.encode())
                if view is not None:
                    self._fan_out(view)
            if time.monotonic() > probe_at:
                # A connection that was cut off says nothing by itself.
                with deadline(connection, _PROBE_LIMIT):
                    connection.execute("SELECT 1")
                probe_at = time.monotonic() + _PROBE_SECONDS
        with self._lock:
            self._listening = False

    def _set_listening(self, listening: bool) -> None:
        with self._lock:
            self._listening = listening
            for subscription in self._subscriptions:
                subscription.way_opened("notify")


def _read_ring(client: redis.Redis, *, key: bytes) -> list[tuple[bytes, View]]:
    entries: Any = client.xrevrange(key, count=_RING_EVENTS)
    parsed = [(stream_id, _parse(fields.get(_FIELD, b""))) for stream_id, fields in reversed(entries)]
    return [(stream_id, view) for stream_id, view in parsed if view is not None]


def _read_on(client: redis.Redis, *, cursors: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes, View]]:
    keys = list(cursors)
    with client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.xrange(key, min=b"(" + cursors[key], count=_RING_EVENTS)
        replies: list[Any] = pipeline.execute()
    return [
        (key, stream_id, _parse(fields.get(_FIELD, b"")) or {})
        for key, entries in zip(keys, replies, strict=True)
        for stream_id, fields in entries
    ]


def _parse(payload: bytes) -> View | None:
    try:
        view = json.loads(payload)
    except ValueError:
        return None
    return view if isinstance(view, dict) else None
