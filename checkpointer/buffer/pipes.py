"""One round trip for many callers: the calls that wait while Redis is busy with others go out together.

Not here: what is called (`commands.py`), where the server is (`places.py`), and what a failure means (`clients.py`).
For a single server only: the calls of a cluster go to different ones.

A *lane* is a connection that carries one *bundle* of calls at a time, as a pipeline; every call is atomic by itself.
While a lane is free, a call has it for itself and waits for nobody. When all are taken calls queue, and the first lane
to come back takes them along. When a lane runs into its time-out, the calls that wait fail with it, unsent: a dead
server costs each caller one time-out at most.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import hiredis
import redis
import redis.asyncio
from redis.exceptions import ResponseError

if TYPE_CHECKING:
    from collections.abc import Sequence

# More than one, so that Redis works on one bundle while the next is made; few, so that bundles become large.
_LANES = 4
# A lane takes so much of what waits; a call that is larger goes alone.
_BUNDLE_CALLS = 200
_BUNDLE_BYTES = 1 << 20

_NOT_SENT = "Redis did not answer those who asked before."
_INTERRUPTED = "The thread that sent this call together with its own was interrupted."


class _Call:
    """A call that waits for its reply.

    Attributes:
        packed: What is sent.
        reply: The reply, or the error in its place.
        wake: For a thread that waits: released when the reply is there, or the bundle.
        bundle: The calls, this one first, that the woken thread has to carry, and over which lane.
    """

    __slots__ = ("bundle", "lane", "packed", "reply", "wake")

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.reply: Any = None
        self.wake: threading.Lock | None = None
        self.bundle: list[_Call] = []
        self.lane: _Lane | None = None

    def result(self) -> Any:
        """Return the reply, or raise it."""
        if isinstance(self.reply, BaseException):
            raise self.reply
        return self.reply


def _take(queue: deque[Any], most: int = _BUNDLE_CALLS) -> list[Any]:
    bundle = [queue.popleft()]
    size = len(bundle[0].packed)
    while queue and len(bundle) < min(most, _BUNDLE_CALLS) and size + len(queue[0].packed) <= _BUNDLE_BYTES:
        size += len(queue[0].packed)
        bundle.append(queue.popleft())
    return bundle


def _together(bundle: Sequence[Any]) -> bytes:
    packed: bytes = bundle[0].packed if len(bundle) == 1 else b"".join([call.packed for call in bundle])
    return packed


class _Lane:
    """A connection; made at first use, and given back to a pool that is not ours after each one."""

    def __init__(self, pool: redis.ConnectionPool, *, keep: bool) -> None:
        self._pool: Any = pool
        self._keep = keep
        self._conn: Any = None

    def exchange(self, bundle: Sequence[_Call]) -> list[Any]:
        """Send calls and return their replies, an error of the server's in the place of the reply.

        Raises:
            RedisError: The server cannot be reached; what became of the calls is open.
        """
        conn = self._conn
        if conn is None:
            conn = self._conn = self._pool.get_connection()
        else:
            self._renew_if_stale(conn)
        try:
            conn.send_packed_command([_together(bundle)], check_health=False)
            return [_read(conn) for _ in bundle]
        except BaseException:
            # The rest of the replies must not be taken for those of the next calls.
            conn.disconnect()
            raise
        finally:
            if not self._keep:
                self._conn = None
                self._pool.release(conn)

    @staticmethod
    def _renew_if_stale(conn: Any) -> None:
        """Connect anew if the server has closed the connection meanwhile, as the pool does for what it hands out."""
        conn.connect()
        try:
            stale = conn.can_read()
        except (redis.ConnectionError, redis.TimeoutError, OSError):
            stale = True
        if stale:
            conn.disconnect()
            conn.connect()


def _read(conn: Any) -> Any:
    try:
        return conn.read_response()
    except ResponseError as exc:
        return exc


class Pipe:
    """See the module; for threads.

    Args:
        client: Whose connections are used.
        keep: They are ours, and need not be given back after each use.
    """

    def __init__(self, client: redis.Redis, *, keep: bool) -> None:
        self._lock = threading.Lock()
        self._queue: deque[_Call] = deque()
        self._free = [_Lane(client.connection_pool, keep=keep) for _ in range(_LANES)]

    def ask(self, *command: Any) -> Any:
        """Send a command and return its reply.

        Raises:
            RedisError: The server refuses it, or cannot be reached.
        """
        call = _Call(hiredis.pack_command(command))
        with self._lock:
            if self._free:
                call.lane, call.bundle = self._free.pop(), [call]
            else:
                call.wake = threading.Lock()
                call.wake.acquire()
                self._queue.append(call)
        if call.wake is not None:
            self._wait(call)
        if call.bundle:
            self._carry(call)
        return call.result()

    def _wait(self, call: _Call) -> None:
        assert call.wake is not None
        try:
            call.wake.acquire()
        except BaseException:
            # Interrupted. If others wait for what this thread was about to carry, it still has to.
            with self._lock:
                if call in self._queue:
                    self._queue.remove(call)
            if call.bundle:
                self._carry(call)
            raise

    def _carry(self, first: _Call) -> None:
        """Exchange a bundle, and hand the lane on to the first of those that have queued meanwhile."""
        bundle, lane = first.bundle, first.lane
        assert lane is not None
        error: BaseException | None = None
        try:
            replies = lane.exchange(bundle)
        except BaseException as exc:  # noqa: BLE001 - each caller gets it
            error = exc
            passed_on = exc if isinstance(exc, Exception) else redis.ConnectionError(_INTERRUPTED)
            replies = [exc, *[passed_on] * (len(bundle) - 1)]
        unsent: list[_Call] = []
        following: _Call | None = None
        with self._lock:
            if isinstance(error, redis.TimeoutError):
                unsent = list(self._queue)
                self._queue.clear()
            if self._queue:
                taken = _take(self._queue)
                following = taken[0]
                following.lane, following.bundle = lane, taken
            else:
                self._free.append(lane)
        for call, reply in zip(bundle, replies, strict=True):
            call.reply = reply
        for call in unsent:
            call.reply = redis.TimeoutError(_NOT_SENT)
        for call in [*bundle[1:], *unsent]:
            assert call.wake is not None
            call.wake.release()
        if following is not None:
            assert following.wake is not None
            following.wake.release()


class _AsyncCall:
    __slots__ = ("future", "packed")

    def __init__(self, packed: bytes, future: asyncio.Future[Any]) -> None:
        self.packed = packed
        self.future = future

    def settle(self, reply: Any) -> None:
        """Hand over the reply, or the error in its place, if somebody still waits for it."""
        if self.future.done():
            return
        if isinstance(reply, Exception):
            self.future.set_exception(reply)
        else:
            self.future.set_result(reply)


class _AsyncLane:
    """See `_Lane`.

    Args:
        pool: Whose connections are used.
        limit: Seconds until a reply, of a connection that is ours and kept; None for those of somebody else, which
            have a limit of their own or none.
    """

    def __init__(self, pool: redis.asyncio.ConnectionPool, limit: float | None) -> None:
        self._pool: Any = pool
        self._limit = limit
        self._conn: Any = None

    async def exchange(self, bundle: Sequence[_AsyncCall]) -> list[Any]:
        """See `_Lane.exchange`."""
        try:
            async with asyncio.timeout(self._limit) as limit:
                return await self._exchange(bundle, limit)
        except TimeoutError as exc:
            raise redis.TimeoutError("Redis did not answer in time.") from exc

    async def _exchange(self, bundle: Sequence[_AsyncCall], limit: asyncio.Timeout) -> list[Any]:
        loop = asyncio.get_running_loop()
        ours = self._limit is not None
        conn = self._conn
        if conn is None:
            conn = self._conn = await self._pool.get_connection()
            if ours:
                # One limit for all is cheaper than redis-py's for each read and write.
                conn.socket_timeout = None
        else:
            await self._pool.ensure_connection(conn)
        try:
            await conn.send_packed_command([_together(bundle)], check_health=False)
            if self._limit is not None:
                limit.reschedule(loop.time() + self._limit)
            replies = []
            for _ in bundle:
                try:
                    replies.append(await conn.read_response(timeout=math.inf if ours else None))
                except ResponseError as exc:
                    replies.append(exc)
        except BaseException:
            await conn.disconnect(nowait=True)
            raise
        finally:
            if not ours:
                self._conn = None
                await self._pool.release(conn)
        return replies


class AsyncPipe:
    """See the module; for the tasks of one event loop.

    Args:
        client: Whose connections are used.
        limit: Seconds until a reply, if they are ours.
    """

    def __init__(self, client: redis.asyncio.Redis, limit: float | None) -> None:
        self._queue: deque[_AsyncCall] = deque()
        self._free = [_AsyncLane(client.connection_pool, limit) for _ in range(_LANES)]
        self._busy = 0
        # The loop keeps only weak references to tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, *command: Any) -> asyncio.Future[Any]:
        """Send a command; one that is cancelled may have been carried out.

        Returns:
            A future of the reply, or of the `RedisError` that says that the server refuses it or cannot be reached.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._queue.append(_AsyncCall(hiredis.pack_command(command), future))
        if self._free:
            # It begins when this task waits, and those that run before it join the bundle.
            task = loop.create_task(self._carry(self._free.pop()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return future

    async def _carry(self, lane: _AsyncLane) -> None:
        """Exchange bundles as long as somebody waits."""
        bundle: list[_AsyncCall] = []
        try:
            while self._queue:
                share = -(-len(self._queue) // (_LANES - self._busy))
                bundle = [call for call in _take(self._queue, share) if not call.future.done()]
                if not bundle:
                    continue
                self._busy += 1
                try:
                    replies = await lane.exchange(bundle)
                except Exception as exc:  # noqa: BLE001 - each caller gets it
                    replies = [exc] * len(bundle)
                    if isinstance(exc, redis.TimeoutError):
                        while self._queue:
                            self._queue.popleft().settle(redis.TimeoutError(_NOT_SENT))
                finally:
                    self._busy -= 1
                for call, reply in zip(bundle, replies, strict=True):
                    call.settle(reply)
        finally:
            self._free.append(lane)
            for call in bundle:
                call.settle(redis.ConnectionError(_INTERRUPTED))
