"""The Redis clients, and the thin runners of script calls.

Not here: what is called (`commands.py`) and which kind of client (`places.py`). There is one synchronous client, one
asynchronous client for each event loop that uses the saver (a connection belongs to its loop), and dedicated ones
for background threads.

In a cluster each partition may be on another server, so each has a health of its own (`part_of`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import redis
import redis.asyncio
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from checkpointer.buffer.keys import tag_of
from checkpointer.buffer.pipes import AsyncPipe, Pipe
from checkpointer.buffer.places import place_of_client, place_of_url
from checkpointer.checks import BufferFacts
from checkpointer.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from checkpointer.buffer.commands import ScriptCall
    from checkpointer.buffer.places import AsyncRedis, Place, SyncRedis
    from checkpointer.tiers import Tier

FAILURES = (RedisError, RedisClusterException, OSError, asyncio.TimeoutError)

_PRIMARIES = {"target_nodes": "primaries"}

# A cluster that moves a slot sends a call elsewhere once, or asks it to wait: after this long it goes around.
_REDIRECTS = 6
_TRY_AGAIN_PAUSE = 0.05

# Another server may have the slot by now.
_ELSEWHERE = (MovedError, ClusterDownError, redis.ConnectionError, redis.TimeoutError, OSError)


class RedisSide:
    """Hands out Redis clients.

    Args:
        url: Makes clients from this URL, or
        client: the user's synchronous client, or
        aclient: the user's asynchronous client; a missing twin is made with the settings of the other.
        timeout: Seconds for connecting and for a reply, of clients made here.
        tier: Learns from every call whether the server is there.
    """

    def __init__(
        self,
        *,
        tier: Tier,
        timeout: float,
        url: str | None = None,
        client: SyncRedis | None = None,
        aclient: AsyncRedis | None = None,
    ) -> None:
        self._tier = tier
        if url is not None:
            self._place: Place = place_of_url(url, timeout)
        else:
            places = [place_of_client(given, timeout) for given in (client, aclient) if given is not None]
            if any(_decodes(given) for given in (client, aclient)):
                raise ConfigurationError(
                    "The Redis client decodes responses: make it with decode_responses=False, checkpoints are bytes."
                )
            self._place = places[0]
        self._timeout = timeout
        self._given = client
        self._agiven = aclient
        self._client = client
        self._pipe: Pipe | None = None
        self._lock = threading.Lock()
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncRedis] = weakref.WeakKeyDictionary()
        self._pipes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncPipe] = weakref.WeakKeyDictionary()

    def dedicated(self) -> SyncRedis:
        """Return a synchronous client of its own; the caller closes it.

        It fails at once instead of retrying: its callers decide what a failure means.

        Raises:
            ConnectionError: No node of a cluster can be reached.
        """
        return self._place.client()

    def client(self) -> SyncRedis:
        """Return the shared synchronous client."""
        client = self._client
        if client is None:
            with self._lock:
                client = self._client
                if client is None:
                    client = self._client = self.dedicated()
        return client

    def aclient(self) -> AsyncRedis:
        """Return the asynchronous client of the running loop."""
        if self._agiven is not None:
            return self._agiven
        loop = asyncio.get_running_loop()
        client = self._by_loop.get(loop)
        if client is None:
            client = self._by_loop[loop] = self._place.aclient()
        return client

    def pipe(self) -> Pipe:
        """Return what carries the calls of threads to a single server."""
        pipe = self._pipe
        if pipe is None:
            client: Any = self.client()
            with self._lock:
                pipe = self._pipe
                if pipe is None:
                    pipe = self._pipe = Pipe(client, keep=client is not self._given)
        return pipe

    def apipe(self) -> AsyncPipe:
        """Return what carries the running loop's calls to a single server."""
        loop = asyncio.get_running_loop()
        pipe = self._pipes.get(loop)
        if pipe is None:
            client: Any = self.aclient()
            pipe = self._pipes[loop] = AsyncPipe(client, None if client is self._agiven else self._timeout)
        return pipe

    def part_of(self, key: bytes) -> bytes | None:
        """Return what shares a server with this key: its partition in a cluster; None says everything."""
        return tag_of(key) if self._place.is_cluster else None

    def run(self, call: ScriptCall) -> Any:
        """Run a script with the shared synchronous client.

        Raises:
            BufferUnavailableError: Redis cannot be reached or refuses; whether the call took effect is open.
        """
        part = self.part_of(call.keys[0])
        begun = self._tier.check(part)
        try:
            if call.confirm:
                reply = _run_confirmed(self.client(), call)
            else:
                ask = self.client().execute_command if self._place.is_cluster else self.pipe().ask
                try:
                    reply = ask("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.args)
                except NoScriptError:
                    reply = ask("EVAL", call.script.source, len(call.keys), *call.keys, *call.args)
        except FAILURES as exc:
            if is_astray(exc):
                self._client = self._given
            raise self._tier.failed(exc, part) from exc
        self._tier.succeeded(begun, part)
        return reply

    async def arun(self, call: ScriptCall) -> Any:
        """Run a script with the running loop's client.

        Raises:
            BufferUnavailableError: Redis cannot be reached or refuses; whether the call took effect is open.
        """
        if call.confirm and self._place.is_cluster:
            # Only the synchronous client can be told which of a node's connections to use.
            return await asyncio.to_thread(self.run, call)
        part = self.part_of(call.keys[0])
        begun = self._tier.check(part)
        try:
            if call.confirm:
                reply = await _arun_confirmed(self.aclient(), call)
            else:
                ask: Any = self.aclient().execute_command if self._place.is_cluster else self.apipe().ask
                try:
                    reply = await ask("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.args)
                except NoScriptError:
                    reply = await ask("EVAL", call.script.source, len(call.keys), *call.keys, *call.args)
        except FAILURES as exc:
            if is_astray(exc):
                await self.aclose()
            raise self._tier.failed(exc, part) from exc
        self._tier.succeeded(begun, part)
        return reply

    def info(self) -> BufferFacts:
        """Return what `INFO` says, of a cluster that of every primary.

        Raises:
            BufferUnavailableError: Redis cannot be reached.
            ConfigurationError: It is a node of a cluster or a sentinel, and the URL or client is for a single server.
        """
        self._tier.check()
        try:
            return self._placed(ask_info(self.client()))
        except FAILURES as exc:
            raise self._tier.failed(exc) from exc

    async def ainfo(self) -> BufferFacts:
        """See `info`."""
        self._tier.check()
        try:
            client = self.aclient()
            clustered = isinstance(client, redis.asyncio.RedisCluster)
            return self._placed(_facts(await client.info(**(_PRIMARIES if clustered else {})), clustered))
        except FAILURES as exc:
            if _is_denied(exc):
                return BufferFacts((), self._place.is_cluster)
            raise self._tier.failed(exc) from exc

    def _placed(self, facts: BufferFacts) -> BufferFacts:
        modes = {node.get("redis_mode") or node.get("server_mode") for node in facts.nodes}  # Valkey's name
        for mode, kind, service in (("cluster", "a node of a cluster", ""), ("sentinel", "a sentinel", "/service")):
            if not self._place.is_cluster and mode in modes:
                raise ConfigurationError(f"Redis is {kind}: use redis+{mode}://host:port{service}, or a client for it.")
        return facts

    def close(self) -> None:
        """Close the synchronous client, if it was made here."""
        if self._client is not None and self._client is not self._given:
            self._client.close()
        self._client = self._given
        self._pipe = None

    async def aclose(self) -> None:
        """Close the running loop's client, if it was made here."""
        self._pipes.pop(asyncio.get_running_loop(), None)
        client = self._by_loop.pop(asyncio.get_running_loop(), None)
        if client is not None:
            with contextlib.suppress(*FAILURES):
                await self._place.aclose(client)

    def forget(self) -> None:
        """In a forked child: leave the parent's connections alone."""
        self._lock = threading.Lock()
        self._client = self._given
        self._pipe = None
        self._by_loop = weakref.WeakKeyDictionary()
        self._pipes = weakref.WeakKeyDictionary()


def is_astray(exc: BaseException) -> bool:
    """Tell whether a cluster client has lost every node that it knew; a new one starts from the addresses given."""
    return isinstance(exc, RedisClusterException)


def _run_confirmed(client: SyncRedis, call: ScriptCall) -> list[Any]:
    """Run a script and, on the same connection, the command that waits for what the script has written."""
    for evaluate, script in (("EVALSHA", call.script.sha), ("EVAL", call.script.source)):
        both = _Together((evaluate, script, len(call.keys), *call.keys, *call.args), call.confirm)
        [reply] = pipelined(client, [(call.keys[0], both)])
        if not isinstance(reply, NoScriptError):
            break
    if isinstance(reply, Exception):
        raise reply
    return list(reply)


async def _arun_confirmed(client: Any, call: ScriptCall) -> list[Any]:
    for evaluate, script in (("EVALSHA", call.script.sha), ("EVAL", call.script.source)):
        both = _Together((evaluate, script, len(call.keys), *call.keys, *call.args), call.confirm)
        pipe = client.pipeline(transaction=False)
        both(pipe)
        reply = both.reply(await pipe.execute(raise_on_error=False))
        if not isinstance(reply, NoScriptError):
            break
    if isinstance(reply, Exception):
        raise reply
    return list(reply)


class _Together:
    """Two commands that go over one connection, the second about what the first has done."""

    def __init__(self, *commands: Sequence[Any]) -> None:
        self._commands = commands

    def __call__(self, pipe: Any) -> None:
        for command in self._commands:
            pipe.execute_command(*command)

    @staticmethod
    def reply(replies: Sequence[Any]) -> Any:
        """Return both replies, or the error that says that the first command was not carried out.

        A server that only refuses to wait has carried it out.
        """
        for reply in replies:
            if isinstance(reply, Exception) and (reply is replies[0] or not isinstance(reply, ResponseError)):
                return reply
        return list(replies)


def pipelined(client: SyncRedis, steps: Sequence[tuple[bytes, Callable[[Any], Any]]]) -> list[Any]:
    """Run commands in one round trip to each server, each command atomic by itself.

    Args:
        client: The client.
        steps: The key that a command is about, and a callable that adds the command to a pipeline.

    Returns:
        The replies; in the place of one that failed its error.

    Raises:
        RedisError: A single server could not be reached.
    """
    if not steps:
        return []
    if isinstance(client, redis.RedisCluster):
        return _on_cluster(client, steps)
    return _execute(client.pipeline(transaction=False), [add for _, add in steps], asking=False)


def _on_cluster(client: Any, steps: Sequence[tuple[bytes, Callable[[Any], Any]]]) -> list[Any]:
    # The client's own pipeline blocks EVALSHA, and after a time-out repeats its commands one by one.
    replies: list[Any] = [None] * len(steps)
    waiting = dict.fromkeys(range(len(steps)), "")  # which command -> where to ask for a slot that is on its way
    for attempt in range(_REDIRECTS):
        by_node: dict[tuple[str, bool], list[int]] = {}
        for i, asked in waiting.items():
            try:
                name = asked or client.get_node_from_key(steps[i][0]).name
                by_node.setdefault((name, bool(asked)), []).append(i)
            except FAILURES as exc:
                replies[i] = exc
        waiting = {}
        failed: dict[int, str] = {}
        for (name, asking), positions in by_node.items():
            try:
                found = _on_node(client, name, asking, [steps[i][1] for i in positions])
            except FAILURES as exc:
                found = [exc] * len(positions)
            for i, reply in zip(positions, found, strict=True):
                replies[i] = reply
                if isinstance(reply, AskError) and not isinstance(reply, MovedError):
                    waiting[i] = f"{reply.host}:{reply.port}"
                elif isinstance(reply, TryAgainError):
                    waiting[i] = ""
                elif isinstance(reply, _ELSEWHERE):
                    failed[i] = name
        if failed:
            with contextlib.suppress(*FAILURES):
                client.nodes_manager.initialize()
                # Whoever has the slot now is asked; a server that is away is not asked twice.
                waiting |= {i: "" for i, name in failed.items() if client.get_node_from_key(steps[i][0]).name != name}
        if not waiting:
            break
        if attempt:
            time.sleep(_TRY_AGAIN_PAUSE)
    return replies


def _on_node(client: Any, name: str, asking: bool, adds: Sequence[Callable[[Any], Any]]) -> list[Any]:
    node = client.get_node(node_name=name)
    if node is None:
        raise redis.ConnectionError(f"The cluster's node {name} is not known yet.")
    return _execute(client.get_redis_connection(node).pipeline(transaction=False), adds, asking=asking)


def ask_info(client: SyncRedis) -> BufferFacts:
    """Return what `INFO` says; nothing if an access list denies it."""
    clustered = isinstance(client, redis.RedisCluster)
    try:
        return _facts(client.info(**(_PRIMARIES if clustered else {})), clustered)
    except ResponseError as exc:
        if _is_denied(exc):
            return BufferFacts((), clustered)
        raise


def _is_denied(exc: BaseException) -> bool:
    # A command can also be taken away by renaming it.
    return isinstance(exc, NoPermissionError) or "unknown command" in str(exc)


def _facts(reply: Any, clustered: bool) -> BufferFacts:
    # A cluster client answers by node, if there are several.
    by_node = all(isinstance(value, dict) for value in reply.values())
    return BufferFacts(tuple(reply.values()) if by_node else (reply,), clustered)


def _execute(pipe: Any, adds: Sequence[Callable[[Any], Any]], *, asking: bool) -> list[Any]:
    """Execute a pipeline; the reply to a `_Together` is that of its pair. ASKING goes before each command's first."""
    ends = []
    for add in adds:
        if asking:
            pipe.execute_command("ASKING")
        add(pipe)
        ends.append(len(pipe))
    replies = list(pipe.execute(raise_on_error=False))
    starts = [0, *ends[:-1]]
    found = []
    for add, start, end in zip(adds, starts, ends, strict=True):
        mine = replies[start + asking : end]
        found.append(add.reply(mine) if isinstance(add, _Together) else mine[0])
    return found


def run_pipeline(client: SyncRedis, calls: Sequence[ScriptCall]) -> list[Any]:
    """Run calls in one round trip to each server, each atomic by itself; see `pipelined`."""

    def evalsha(call: ScriptCall) -> tuple[bytes, Callable[[Any], Any]]:
        return call.keys[0], lambda pipe: pipe.evalsha(call.script.sha, len(call.keys), *call.keys, *call.args)

    def evaluate(call: ScriptCall) -> tuple[bytes, Callable[[Any], Any]]:
        return call.keys[0], lambda pipe: pipe.eval(call.script.source, len(call.keys), *call.keys, *call.args)

    replies = pipelined(client, [evalsha(call) for call in calls])
    # A server that has not seen a script yet gets its text once, and knows it for the rest.
    unknown: dict[tuple[Any, bytes], list[int]] = {}
    for i, reply in enumerate(replies):
        if isinstance(reply, NoScriptError):
            unknown.setdefault((calls[i].script, tag_of(calls[i].keys[0])), []).append(i)
    again = [
        evaluate(calls[i]) if n == 0 else evalsha(calls[i]) for group in unknown.values() for n, i in enumerate(group)
    ]
    positions = [i for group in unknown.values() for i in group]
    for i, reply in zip(positions, pipelined(client, again), strict=True):
        replies[i] = reply
    return replies


def _decodes(client: SyncRedis | AsyncRedis | None) -> bool:
    if client is None:
        return False
    cluster = isinstance(client, redis.RedisCluster | redis.asyncio.RedisCluster)
    holder: Any = client.nodes_manager if cluster else client.connection_pool  # type: ignore[union-attr]
    return bool(holder.connection_kwargs.get("decode_responses"))
