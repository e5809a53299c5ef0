"""The Redis clients: the user's own, or made from a URL, and the thin runners of a script call.

Not here: what is called (`commands.py`). There is one synchronous client, one asynchronous client for each event
loop that uses the saver (a connection belongs to its loop), and dedicated ones for background threads.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError, RedisError, ResponseError
from redis.retry import Retry

from checkpointer.checks import BufferFacts
from checkpointer.errors import ConfigurationError

if TYPE_CHECKING:
    from checkpointer.buffer.commands import ScriptCall
    from checkpointer.tiers import Tier

SyncRedis = redis.Redis | redis.RedisCluster
AsyncRedis = redis.asyncio.Redis | redis.asyncio.RedisCluster

_PRIMARIES = {"target_nodes": "primaries"}
_FAILURES = (RedisError, OSError, asyncio.TimeoutError)

# What of a client's connection settings its twin in the other world understands.
_SHARED = (
    "host",
    "port",
    "db",
    "username",
    "password",
    "path",
    "client_name",
    "credential_provider",
    "health_check_interval",
    "socket_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
)


def check_url(url: str) -> None:
    """Refuse a URL that cannot be one of Redis.

    Raises:
        ConfigurationError: It is not.
    """
    try:
        redis.ConnectionPool.from_url(url)
        _ = urlsplit(url).port
    except (ValueError, AttributeError, TypeError) as exc:
        raise ConfigurationError(
            f"redis_url is not a Redis URL ({exc}): use redis://[user:password@]host[:port], rediss://... or unix://path."
        ) from exc


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
        for given in (client, aclient):
            if given is not None and _settings(given).get("decode_responses"):
                raise ConfigurationError(
                    "The Redis client decodes responses: make it with decode_responses=False, checkpoints are bytes."
                )
        if url is not None:
            check_url(url)
        self._tier = tier
        self._timeout = timeout
        self._url = url
        self._given = client
        self._agiven = aclient
        self._client = client
        self._lock = threading.Lock()
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncRedis] = weakref.WeakKeyDictionary()

    def _common(self) -> dict[str, Any]:
        return {
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            "protocol": 2,
            "decode_responses": False,
        }

    def dedicated(self) -> SyncRedis:
        """Return a synchronous client of its own; the caller closes it.

        It fails at once instead of retrying: its callers decide what a failure means.
        """
        retry = Retry(NoBackoff(), 0)
        if self._url is not None:
            return redis.Redis.from_url(self._url, retry=retry, **self._common())
        given = self._given or self._agiven
        if not isinstance(given, redis.Redis | redis.asyncio.Redis):
            if self._given is None:
                raise ConfigurationError(
                    "For an asynchronous cluster client give the synchronous one too: redis=RedisCluster(...)."
                )
            return self._given
        pool = given.connection_pool
        connection = _class_named(pool.connection_class.__name__, redis)
        settings = {k: v for k, v in pool.connection_kwargs.items() if k in _SHARED or k.startswith("ssl_")}
        return redis.Redis(
            connection_pool=redis.ConnectionPool(
                connection_class=connection, retry=retry, **{**self._common(), **settings}
            )
        )

    def client(self) -> SyncRedis:
        """Return the shared synchronous client."""
        if self._client is None:
            with self._lock:
                if self._client is None:
                    self._client = self.dedicated()
        return self._client

    def aclient(self) -> AsyncRedis:
        """Return the asynchronous client of the running loop."""
        if self._agiven is not None:
            return self._agiven
        loop = asyncio.get_running_loop()
        client = self._by_loop.get(loop)
        if client is None:
            client = self._by_loop[loop] = self._make_async()
        return client

    def _make_async(self) -> AsyncRedis:
        from redis.asyncio.retry import Retry as AsyncRetry

        retry = AsyncRetry(NoBackoff(), 0)
        if self._url is not None:
            return redis.asyncio.Redis.from_url(self._url, retry=retry, **self._common())
        if not isinstance(self._given, redis.Redis):
            raise ConfigurationError(
                "For a synchronous cluster client give the asynchronous one too: async_redis=RedisCluster(...)."
            )
        pool = self._given.connection_pool
        connection = _class_named(pool.connection_class.__name__, redis.asyncio)
        settings = {k: v for k, v in pool.connection_kwargs.items() if k in _SHARED or k.startswith("ssl_")}
        return redis.asyncio.Redis.from_pool(
            redis.asyncio.ConnectionPool(connection_class=connection, retry=retry, **{**self._common(), **settings})
        )

    def run(self, call: ScriptCall) -> Any:
        """Run a script with the shared synchronous client.

        Raises:
            BufferUnavailableError: Redis cannot be reached or refuses; whether the call took effect is open.
        """
        begun = self._tier.check()
        client = self.client()
        try:
            if call.confirm:
                reply = _run_confirmed(client, call)
            else:
                try:
                    reply = client.evalsha(call.script.sha, len(call.keys), *call.keys, *call.args)
                except NoScriptError:
                    reply = client.eval(call.script.source, len(call.keys), *call.keys, *call.args)
        except _FAILURES as exc:
            raise self._tier.failed(exc) from exc
        self._tier.succeeded(begun)
        return reply

    async def arun(self, call: ScriptCall) -> Any:
        """Run a script with the running loop's client.

        Raises:
            BufferUnavailableError: Redis cannot be reached or refuses; whether the call took effect is open.
        """
        client = self.aclient()
        if call.confirm and isinstance(client, redis.asyncio.RedisCluster):
            # Only the synchronous client can be told which of a node's connections to use.
            return await asyncio.to_thread(self.run, call)
        begun = self._tier.check()
        try:
            if call.confirm:
                reply = await _arun_confirmed(client, call)
            else:
                try:
                    reply = await client.evalsha(call.script.sha, len(call.keys), *call.keys, *call.args)
                except NoScriptError:
                    reply = await client.eval(call.script.source, len(call.keys), *call.keys, *call.args)
        except _FAILURES as exc:
            raise self._tier.failed(exc) from exc
        self._tier.succeeded(begun)
        return reply

    def info(self) -> BufferFacts:
        """Return what `INFO` says, of a cluster that of every primary.

        Raises:
            BufferUnavailableError: Redis cannot be reached.
        """
        self._tier.check()
        client = self.client()
        try:
            return ask_info(client)
        except _FAILURES as exc:
            raise self._tier.failed(exc) from exc

    async def ainfo(self) -> BufferFacts:
        """See `info`."""
        self._tier.check()
        client = self.aclient()
        clustered = isinstance(client, redis.asyncio.RedisCluster)
        try:
            return _facts(await client.info(**(_PRIMARIES if clustered else {})), clustered)
        except _FAILURES as exc:
            if _is_denied(exc):
                return BufferFacts((), clustered)
            raise self._tier.failed(exc) from exc

    def close(self) -> None:
        """Close the synchronous client, if it was made here."""
        if self._client is not None and self._client is not self._given:
            self._client.close()
        self._client = self._given

    async def aclose(self) -> None:
        """Close the running loop's client, if it was made here."""
        client = self._by_loop.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def forget(self) -> None:
        """In a forked child: leave the parent's connections alone."""
        self._client = self._given
        self._by_loop = weakref.WeakKeyDictionary()


def _run_confirmed(client: SyncRedis, call: ScriptCall) -> list[Any]:
    """Run a script and, on the same connection, the command that waits for what the script has written."""
    if isinstance(client, redis.RedisCluster):
        node = client.get_node_from_key(call.keys[0])  # type: ignore[no-untyped-call]  # as redis-py has it
        client = client.get_redis_connection(node)
    for evaluate, script in (("EVALSHA", call.script.sha), ("EVAL", call.script.source)):
        pipe: Any = client.pipeline(transaction=False)
        pipe.execute_command(evaluate, script, len(call.keys), *call.keys, *call.args)
        pipe.execute_command(*call.confirm)
        replies = pipe.execute(raise_on_error=False)
        if not isinstance(replies[0], NoScriptError):
            return _confirmed(replies)
    raise replies[0]


async def _arun_confirmed(client: Any, call: ScriptCall) -> list[Any]:
    for evaluate, script in (("EVALSHA", call.script.sha), ("EVAL", call.script.source)):
        pipe = client.pipeline(transaction=False)
        pipe.execute_command(evaluate, script, len(call.keys), *call.keys, *call.args)
        pipe.execute_command(*call.confirm)
        replies = await pipe.execute(raise_on_error=False)
        if not isinstance(replies[0], NoScriptError):
            return _confirmed(replies)
    raise replies[0]


def _confirmed(replies: list[Any]) -> list[Any]:
    if isinstance(replies[0], Exception):
        raise replies[0]
    if isinstance(replies[1], Exception) and not isinstance(replies[1], ResponseError):
        raise replies[1]
    return replies


def run_pipeline(client: SyncRedis, calls: list[ScriptCall]) -> list[Any]:
    """Run calls in one round trip, each atomic by itself."""
    if not calls:
        return []
    for attempt in (0, 1):
        pipe = client.pipeline(transaction=False)
        for call in calls:
            pipe.evalsha(call.script.sha, len(call.keys), *call.keys, *call.args)
        try:
            return list(pipe.execute())
        except NoScriptError:
            if attempt:
                raise
            for script in {call.script for call in calls}:
                client.script_load(script.source)
    raise AssertionError("the second attempt returns or raises")


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


def _settings(client: SyncRedis | AsyncRedis) -> dict[str, Any]:
    if isinstance(client, redis.Redis | redis.asyncio.Redis):
        return dict(client.connection_pool.connection_kwargs)
    if isinstance(client, redis.RedisCluster | redis.asyncio.RedisCluster):
        return {}
    raise ConfigurationError(
        f"redis must be a URL or a client of redis-py, not {type(client).__name__}: use redis.Redis.from_url(...)."
    )


def _class_named(name: str, module: Any) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise ConfigurationError(
            f"The Redis client uses connections of a class of its own ({name}): give both redis= and async_redis=."
        )
    return found
