"""The registry that fans events out to hooks, and the way hooks are found by name.

A *hook* is any callable that takes a `CheckpointEvent`. Each one gets a *lane* of its own: a bounded queue
and a daemon thread, so that a hook that hangs, raises or floods costs neither the graph nor another hook
anything. One more lane, the *inbox*, hands events to those lanes, so that an emitter wakes one thread and
not one for each hook. What a hook misses, by its own fault or by being too slow, is an event for the others:
`hook.failing`, `hook.dropped`, `hook.stuck`, `hook.recovered`. A hook that keeps failing *rests* for a while: it is
given nothing but criticals. Not here: what the standard hooks do (`observability/hooks/`) and the making of events.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from checkpointer.errors import ClosedError, ConfigurationError
from checkpointer.events import CheckpointEvent, describe_error
from checkpointer.instruments import Instruments
from checkpointer.run_streams import RunStreams

if TYPE_CHECKING:
    from collections.abc import Awaitable

    import psycopg
    import redis

Hook = Callable[[CheckpointEvent], Any]
"""A callable `hook(event)`, plain or async; what it returns is ignored."""

STANDARD_HOOKS = ("console", "thread_log", "run_events", "system_errors")
"""Names of the hooks that a saver has unless told otherwise."""

ENTRY_POINT_GROUP = "checkpointer.hooks"
"""Entry point group in which packages announce hook factories: `name = "module:factory"`."""

logger = logging.getLogger("checkpointer.hooks")

_REPORT_INTERVAL = 10.0
# How long a hook may take for one event. One that is async is ended then; a plain one cannot be, and is told of.
_DEADLINE = 30.0
# After so many failures in a row a hook rests, at first and at most so long, in seconds.
_FAILURES_TO_REST = 5
_FIRST_REST = 1.0
_LONGEST_REST = 60.0
_EXIT_TIMEOUT = 2.0
_STOP = object()
# The inbox holds what a burst leaves before its thread gets the interpreter, for any number of hooks.
_INBOX_FACTOR = 4
# How long the inbox lets events gather, in seconds. Handing each on at once would have its thread, and then a lane's,
# take the interpreter from the emitter in the middle of the put that follows.
_GATHER = 0.005


def redis_client(url: str, timeout: float) -> redis.Redis:
    """Make a client as `HookContext.connect_redis` does, from any URL that the saver takes.

    Raises:
        ConfigurationError: It is not a Redis URL.
        ConnectionError: No node of a cluster can be reached.
    """
    # Not at the top: a hook of somebody else needs nothing of the buffer.
    from checkpointer.buffer.places import place_of_url

    return place_of_url(url, timeout).client()  # type: ignore[return-value]  # a cluster client does as well


def _tell_nobody(event: CheckpointEvent) -> None:
    """Take an event where there are no other hooks."""


@dataclass(frozen=True)
class HookContext:
    """What a hook factory may use: connections of the hook's own, never the saver's.

    Attributes:
        connect_postgres: Opens a new autocommit connection; raises `psycopg.OperationalError`.
        connect_redis: Makes a new client with byte replies, no retries and timeouts of two seconds.
        prefix: What Redis keys begin with, made of letters, digits, `_`, `.`, `-` and `:`; one for each schema.
        identity: Unique for this database, Redis and prefix together; fit for a file name.
        run_streams: The streams of the runs that use the saver.
        emit: Tells the other hooks of the saver of an event.
        instruments: What the saver, or the worker, can be measured by.
    """

    connect_postgres: Callable[[], psycopg.Connection[Any]]
    connect_redis: Callable[[], redis.Redis]
    prefix: str
    identity: str
    run_streams: RunStreams = field(default_factory=RunStreams)
    emit: Callable[[CheckpointEvent], None] = _tell_nobody
    instruments: Instruments = field(default_factory=Instruments)


def target_identity(conninfo: str, redis_url: str, prefix: str) -> str:
    """Return a `HookContext.identity`: the same for the same addresses and prefix, and without credentials."""
    return hashlib.sha256(f"{conninfo}\0{redis_url}\0{prefix}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class HookStats:
    """What became of the events offered to one hook.

    Attributes:
        delivered: The hook returned.
        failed: The hook raised.
        dropped_full: Its queue had no room.
        dropped_closed: They came after `close()`.
        skipped: It had failed several times in a row, and was resting.
        queued: Waiting, or being handled right now.
    """

    delivered: int = 0
    failed: int = 0
    dropped_full: int = 0
    dropped_closed: int = 0
    skipped: int = 0
    queued: int = 0


@dataclass(frozen=True, slots=True)
class _Emitted:
    """An event in the inbox, with the lanes that there were then, and the one whose hook emitted it."""

    event: CheckpointEvent
    source: _Lane | None
    lanes: tuple[_Lane, ...]


class _Lane:
    """A bounded queue, the thread that empties it into a function, and counters.

    Args:
        handle: The function; may be async.
        name: For threads, counters and reports.
        capacity: How many items may wait.
        reserved: How many of those places only critical ones may take.
        tell: Takes what this lane says of itself.
        gather: How long to wait for more when an item comes, in seconds, so that the thread wakes less often.
    """

    def __init__(
        self,
        handle: Callable[[Any], Any],
        name: str,
        capacity: int,
        reserved: int,
        tell: Callable[[_Lane, CheckpointEvent], None],
        gather: float = 0.0,
    ) -> None:
        self.name = name
        self._gather = gather
        self._handle = handle
        self._tell = tell
        self._capacity = capacity
        self._reserved = reserved
        self.renew()

    def renew(self) -> None:
        """Start over with an empty queue and no thread, as a forked child has to."""
        # Re-entrant, since a finaliser or a signal handler may emit while this thread is inside `offer`.
        self._lock = threading.RLock()
        self._progress = threading.Condition(self._lock)
        # SimpleQueue.put is re-entrant and never blocks; the bound is kept by counting.
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ident: int | None = None
        self._stopping = False
        self._close_hook = False
        self._accepted = 0
        self._handled = 0
        self._failed = 0
        self._dropped_full = 0
        self._dropped_closed = 0
        self._skipped = 0
        self._busy_since: float | None = None
        self._is_stuck = False
        self._in_a_row = 0
        self._rest = _FIRST_REST
        self._rests_until = 0.0
        self._unreported_failures = 0
        self._unreported_skips = 0
        self._reported_drops = 0
        self._next_report = 0.0

    def offer(self, item: Any, *, critical: bool) -> None:
        """Queue an item or count why not."""
        with self._lock:
            if self._stopping:
                self._dropped_closed += 1
                return
            room = self._capacity if critical else self._capacity - self._reserved
            if self._accepted - self._handled >= room:
                self._dropped_full += 1
                return
            self._accepted += 1
            self._queue.put((item, critical))
            if self._thread is None:
                self._start()

    def stop(self, *, close_hook: bool) -> None:
        """Take no more events; handle those that wait, then end the thread."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self._close_hook = close_hook and callable(getattr(self._handle, "close", None))
            self._queue.put(_STOP)
            # The hook is closed on its own thread: a `close` that hangs must not hang the caller.
            if self._thread is None and (self._close_hook or self._accepted > self._handled):
                self._start()

    def join(self, deadline: float) -> None:
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("hook %s did not end in time; %d events given up", self.name, self.stats().queued)

    def is_current(self) -> bool:
        """Return whether the caller runs on this lane's thread."""
        return threading.get_ident() == self._ident

    def wait_handled(self, deadline: float) -> bool:
        """Wait until everything accepted so far has been handled."""
        if self.is_current():
            return True
        with self._progress:
            target = self._accepted
            return self._progress.wait_for(lambda: self._handled >= target, max(0.0, deadline - time.monotonic()))

    def stats(self) -> HookStats:
        with self._lock:
            return HookStats(
                delivered=self._handled - self._failed - self._skipped,
                failed=self._failed,
                dropped_full=self._dropped_full,
                dropped_closed=self._dropped_closed,
                skipped=self._skipped,
                queued=self._accepted - self._handled,
            )

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"checkpointer-hook-{self.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # No thread to be had (a limit, or the interpreter is ending): the next event tries again.
            return
        self._thread = thread

    def _run(self) -> None:
        self._ident = threading.get_ident()
        queue = self._queue
        # Makes no loop until an async hook needs one.
        runner = asyncio.Runner()
        gathered = 0
        try:
            while (taken := queue.get()) is not _STOP:
                if gathered:
                    gathered -= 1
                elif self._gather:
                    time.sleep(self._gather)
                    gathered = queue.qsize()
                item, critical = taken
                skipped = time.monotonic() < self._rests_until and not critical
                failed = not skipped and self._take(runner, item)
                with self._progress:
                    self._handled += 1
                    self._failed += failed
                    self._skipped += skipped
                    self._progress.notify_all()
                self._unreported_skips += skipped
                self._report_drops()
            self._next_report = 0.0
            self._report_drops()
            if self._close_hook:
                self._call(runner, cast("Any", self._handle).close)
        finally:
            runner.close()
            # A thread started later may get the same one.
            self._ident = None

    def _take(self, runner: asyncio.Runner, item: Any) -> bool:
        """Have one item handled; return whether that failed."""
        self._busy_since = time.monotonic()
        failed = self._call(runner, self._handle, item)
        self._busy_since = None
        if failed:
            self._in_a_row += 1
            if self._in_a_row >= _FAILURES_TO_REST:
                self._rests_until = time.monotonic() + self._rest
                self._rest = min(self._rest * 2, _LONGEST_REST)
            return True
        if self._in_a_row >= _FAILURES_TO_REST or self._is_stuck:
            self._say("hook.recovered", f"Hook {self.name} works again.", {})
        self._in_a_row, self._rest, self._rests_until, self._is_stuck = 0, _FIRST_REST, 0.0, False
        return False

    def _call(self, runner: asyncio.Runner, function: Callable[..., Any], *args: Any) -> bool:
        """Call and, if need be, await; return whether it failed."""
        try:
            result = function(*args)
            if inspect.isawaitable(result):
                runner.run(_await(result))
        # BaseException: a hook that raises SystemExit or CancelledError must not end its lane either.
        except BaseException as exc:  # noqa: BLE001 - reported by the next line
            self._report_failure(exc)
            return True
        return False

    def look(self, now: float) -> None:
        """Tell of a hook that has been at one event for too long, once."""
        since = self._busy_since
        if since is not None and now - since > _DEADLINE and not self._is_stuck:
            self._is_stuck = True
            message = f"Hook {self.name} has been at one event for {now - since:.0f} s; others wait behind it."
            self._say("hook.stuck", message, {"seconds": round(now - since, 1), "queued": self.stats().queued})

    def _report_failure(self, exc: BaseException) -> None:
        self._unreported_failures += 1
        if time.monotonic() < self._next_report:
            return
        count, self._unreported_failures = self._unreported_failures, 0
        self._log("hook %s failed (%d times since the last report)", count, with_stack=True)
        skips, self._unreported_skips = self._unreported_skips, 0
        left_out = f", and was spared {skips} events meanwhile" if skips else ""
        message = f"Hook {self.name} failed {count} times since the last report{left_out}."
        self._say("hook.failing", message, {"failed": count, "skipped": skips}, exc)

    def _report_drops(self) -> None:
        # Here and not in `offer`, since logging may block.
        dropped = self._dropped_full - self._reported_drops
        if not dropped or time.monotonic() < self._next_report:
            return
        self._reported_drops += dropped
        self._log("hook %s is too slow: %d events were not delivered to it", dropped, with_stack=False)
        message = f"Hook {self.name} is too slow: {dropped} events were not delivered to it."
        self._say("hook.dropped", message, {"dropped": dropped})

    def _say(self, name: str, message: str, context: dict[str, Any], exc: BaseException | None = None) -> None:
        is_over = name == "hook.recovered"
        self._tell(
            self,
            CheckpointEvent(
                name=name,
                error_type=None if is_over else "hook_error",
                severity="info" if is_over else "warning",
                message=message,
                component="hooks",
                outcome="recovered" if is_over else None,
                error=None if exc is None else describe_error(exc),
                context={"hook": self.name, **context},
            ),
        )

    def _log(self, message: str, count: int, *, with_stack: bool) -> None:
        self._next_report = time.monotonic() + _REPORT_INTERVAL
        # A logging handler that raises must not end the lane.
        with contextlib.suppress(Exception):
            logger.warning(message, self.name, count, exc_info=with_stack)


async def _await(result: Awaitable[Any]) -> Any:
    async with asyncio.timeout(_DEADLINE):
        return await result


class Hooks:
    """The hooks of one saver.

    Safe to use from any thread and any event loop. A forked child starts with the same hooks, empty queues
    and no threads; a hook that holds connections has to notice the fork itself.

    Args:
        capacity: How many events may wait for one hook.
        reserved: How many of those places only critical events may take.
        notice: Is called with each event where it is emitted, also if there are no hooks, and returns the one that the
            hooks are given; neither waits nor raises.
    """

    def __init__(
        self,
        *,
        capacity: int = 1000,
        reserved: int = 200,
        notice: Callable[[CheckpointEvent], CheckpointEvent] | None = None,
    ) -> None:
        if not 0 <= reserved < capacity:
            raise ConfigurationError(f"reserved={reserved} must be at least 0 and below capacity={capacity}")
        self._capacity = capacity
        self._reserved = reserved
        self._notice = notice
        self._lock = threading.RLock()
        # Replaced, never changed, so that `emit` can take it along without a lock.
        self._lanes: tuple[_Lane, ...] = ()
        self._inbox = _Lane(
            _distribute, "inbox", capacity * _INBOX_FACTOR, reserved * _INBOX_FACTOR, self._tell, _GATHER
        )
        self._closed = False
        _open_hooks.add(self)
        renew_in_child(self._renew)

    def add(self, hook: Hook, *, name: str | None = None) -> Callable[[], None]:
        """Subscribe a hook.

        Args:
            hook: Called with each event, on a thread of its own; an async one in that thread's own loop.
                Events that it emits from there reach the other hooks, not itself.
            name: Its name in `stats()` and in logs; made unique with a number if taken.

        Returns:
            A callable that unsubscribes it. What is already queued for it is still delivered; the hook's
            own `close()` is left to whoever unsubscribes it.

        Raises:
            ClosedError: `close()` was called.
        """
        base = name or getattr(hook, "__name__", None) or type(hook).__name__
        with self._lock:
            if self._closed:
                raise ClosedError("hooks cannot be added after close()")
            taken = {lane.name for lane in self._lanes}
            unique, number = base, 1
            while unique in taken:
                number += 1
                unique = f"{base}-{number}"
            lane = _Lane(hook, unique, self._capacity, self._reserved, self._tell)
            self._lanes = (*self._lanes, lane)

        def unsubscribe() -> None:
            with self._lock:
                self._lanes = tuple(other for other in self._lanes if other is not lane)
            lane.stop(close_hook=False)

        return unsubscribe

    def emit(self, event: CheckpointEvent) -> None:
        """Offer an event to every hook; never waits for one and never raises."""
        if self._notice is not None:
            event = self._notice(event)
        lanes = self._lanes
        if lanes:
            # Told now: when the inbox comes to it, this thread may have ended and a lane's got its identifier.
            source = next((lane for lane in lanes if lane.is_current()), None)
            emitted = _Emitted(event, source, lanes)
            self._inbox.offer(emitted, critical=event.severity == "critical")

    def _tell(self, lane: _Lane, event: CheckpointEvent) -> None:
        """Offer what a lane says of itself to the others; its own hook would only be given more to fail at."""
        if self._notice is not None:
            event = self._notice(event)
        self._inbox.offer(_Emitted(event, lane, self._lanes), critical=False)

    def stats(self) -> dict[str, HookStats]:
        """Return the counters of each hook by its name."""
        inbox = self._inbox.stats()
        stats = {}
        for lane in self._lanes:
            own = lane.stats()
            stats[lane.name] = replace(
                own,
                dropped_full=own.dropped_full + inbox.dropped_full,
                dropped_closed=own.dropped_closed + inbox.dropped_closed,
                queued=own.queued + inbox.queued,
            )
        return stats

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until every hook has handled what was emitted before this call.

        Args:
            timeout: Seconds for all hooks together.

        Returns:
            Whether they have. Called by a hook, it does not wait for that hook.
        """
        deadline = time.monotonic() + timeout
        return all(lane.wait_handled(deadline) for lane in (self._inbox, *self._lanes))

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what waits, call each hook's `close()` if it has one, and end the threads.

        Events emitted from now on are only counted. Calling it again does nothing.

        Args:
            timeout: Seconds for all hooks together; a hook that needs longer is left to its daemon thread.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._inbox.stop(close_hook=False)
        self._inbox.join(deadline)
        for lane in self._lanes:
            lane.stop(close_hook=True)
        for lane in self._lanes:
            lane.join(deadline)

    def _renew(self) -> None:
        self._lock = threading.RLock()
        for lane in (self._inbox, *self._lanes):
            lane.renew()
            if self._closed:
                lane.stop(close_hook=False)


def _distribute(emitted: _Emitted) -> None:
    critical = emitted.event.severity == "critical"
    now = time.monotonic()
    for lane in emitted.lanes:
        lane.look(now)
        if lane is not emitted.source:
            lane.offer(emitted.event, critical=critical)


_renewals: list[weakref.WeakMethod[Callable[[], None]]] = []
_open_hooks: weakref.WeakSet[Hooks] = weakref.WeakSet()
_process_lock = threading.Lock()
_watching = False


def renew_in_child(renew: Callable[[], None]) -> None:
    """Have a bound method called in each forked child, before anything else runs there.

    Args:
        renew: A bound method that replaces locks, queues and threads; its object is held weakly.
    """
    global _watching
    with _process_lock:
        _renewals[:] = [known for known in _renewals if known() is not None]
        _renewals.append(weakref.WeakMethod(renew))
        if not _watching:
            _watching = True
            os.register_at_fork(
                before=_process_lock.acquire,
                after_in_parent=_process_lock.release,
                after_in_child=_renew_all,
            )
            atexit.register(_flush_at_exit)


def _renew_all() -> None:
    _process_lock.release()
    for reference in list(_renewals):
        if renew := reference():
            renew()


def _flush_at_exit() -> None:
    # The lanes are daemon threads, which the interpreter stops without asking.
    deadline = time.monotonic() + _EXIT_TIMEOUT
    for hooks in list(_open_hooks):
        hooks.flush(max(0.0, deadline - time.monotonic()))


def load_hook(name: str, context: HookContext) -> Hook:
    """Make the hook that some installed package announces under `name`.

    Args:
        name: An entry point's name in the group `checkpointer.hooks`; its value is a factory that takes
            a `HookContext` and returns a hook.
        context: Handed to the factory.

    Raises:
        ConfigurationError: No such name (the message lists the known ones), or its module cannot be
            imported.
    """
    known = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in known:
        raise ConfigurationError(f"there is no hook named {name!r}; known are: {', '.join(sorted(known)) or 'none'}")
    try:
        factory = known[name].load()
    except (ImportError, AttributeError) as exc:
        raise ConfigurationError(f"hook {name!r} ({known[name].value}) cannot be loaded: {exc}") from exc
    return cast("Hook", factory(context))
