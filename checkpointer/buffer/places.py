"""Where the buffer is: one server, a cluster, or a master that sentinels watch; read from a URL or a user's client.

Not here: what is called (`commands.py`) and how an answer or a failure is taken (`clients.py`). A *place* makes
synchronous and asynchronous clients of its kind. They do not retry: whoever calls decides what a failure means.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.cluster
import redis.connection
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from checkpointer.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

SyncRedis = redis.Redis | redis.RedisCluster
AsyncRedis = redis.asyncio.Redis | redis.asyncio.RedisCluster
Node = tuple[str, int]

# redis-py leaves these without types.
_parse_url: Any = redis.connection.parse_url
_ClusterNode: Any = redis.cluster.ClusterNode
_Sentinel: Any = redis.sentinel.Sentinel
_AsyncSentinel: Any = redis.asyncio.sentinel.Sentinel

_FORMS = (
    # Without the form of a password in its place, where scrubbing would blank it.
    "use redis://host[:port][/db] or unix://path; redis+cluster://host:port[,host:port]; "
    "redis+sentinel://host:port[,host:port]/service[/db]; with user:password@ before the first host where they are "
    "needed, and rediss instead of redis for TLS"
)

# What of a client's connection settings its twin in the other world understands.
_LOGIN = ("username", "password", "client_name", "credential_provider")
_SHARED = (*_LOGIN, "health_check_interval", "socket_timeout", "socket_connect_timeout", "socket_keepalive")
_ONE_SERVER = ("host", "port", "db", "path", *_SHARED)

# redis-py 8 refuses the 101st concurrent call of a client; a refusal would be taken for an outage.
_MAX_CONNECTIONS = 1 << 20


def place_of_url(url: str, timeout: float) -> Place:
    """Read a URL.

    Raises:
        ConfigurationError: It cannot be one of Redis.
    """
    try:
        parts = urlsplit(url)
        base, plus, kind = parts.scheme.partition("+")
        if not plus:
            return _Url(url, timeout)
        if base not in ("redis", "rediss") or kind not in ("cluster", "sentinel"):
            raise ValueError(f"unknown scheme {parts.scheme}")
        login, _, hosts = parts.netloc.rpartition("@")
        nodes = [_node(part, 6379 if kind == "cluster" else 26379) for part in hosts.split(",")]
        segments = parts.path.strip("/").split("/")
        database = segments.pop() if kind == "sentinel" and len(segments) == 2 else "0"
        settings = _parse_url(f"redis://{login}{'@' if login else ''}host/{int(database)}?{parts.query}")
        del settings["host"]
        settings["ssl"] = base == "rediss"
        if kind == "cluster":
            if segments != [""] or settings.pop("db", 0):
                raise ValueError("a cluster has no databases")
            return _Cluster(nodes, settings, timeout)
        if len(segments) != 1 or not segments[0]:
            raise ValueError("the service's name is missing")
        watch = {
            name.removeprefix("sentinel_"): settings.pop(name)
            for name in list(settings)
            if name.startswith("sentinel_")
        }
        return _Sentinels(nodes, unquote(segments[0]), settings, {"ssl": settings["ssl"], **watch}, timeout)
    except (ValueError, AttributeError, TypeError) as exc:
        # Without the URL: it can hold a password.
        raise ConfigurationError(f"redis_url is not a Redis URL ({exc}): {_FORMS}.") from exc


def _node(text: str, port: int) -> Node:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    return parts.hostname, parts.port or port


def place_of_client(client: SyncRedis | AsyncRedis, timeout: float) -> Place:
    """Take the settings of a user's client.

    Raises:
        ConfigurationError: It is no client of redis-py, or has connections of a class of its own.
    """
    if isinstance(client, redis.RedisCluster | redis.asyncio.RedisCluster):
        return _of_cluster(client, timeout)
    if not isinstance(client, redis.Redis | redis.asyncio.Redis):
        raise ConfigurationError(
            f"redis must be a URL or a client of redis-py, not {type(client).__name__}: use redis.Redis.from_url(...)."
        )
    pool: Any = client.connection_pool
    if isinstance(pool, redis.sentinel.SentinelConnectionPool | redis.asyncio.sentinel.SentinelConnectionPool):
        watchers: Any = [watcher.connection_pool for watcher in pool.sentinel_manager.sentinels]
        nodes = [(w.connection_kwargs["host"], w.connection_kwargs["port"]) for w in watchers]
        settings, watch = (
            _settings(p.connection_kwargs) | {"ssl": "SSL" in p.connection_class.__name__} for p in (pool, watchers[0])
        )
        database = pool.connection_kwargs.get("db", 0)
        return _Sentinels(nodes, pool.service_name, settings | {"db": database}, watch, timeout)
    return _One(pool.connection_class.__name__, pool.connection_kwargs, timeout)


def _of_cluster(client: redis.RedisCluster | redis.asyncio.RedisCluster, timeout: float) -> Place:
    manager: Any = client.nodes_manager
    found: dict[str, Any] = manager.connection_kwargs
    nodes = [(node.host, node.port) for node in manager.startup_nodes.values()]
    secure = found.get("ssl") or "SSL" in getattr(found.get("connection_class"), "__name__", "")
    settings = _settings(found) | {"ssl": bool(secure)}
    if manager.address_remap is not None:
        settings["address_remap"] = manager.address_remap
    return _Cluster(nodes, settings, timeout)


def _settings(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name in _SHARED or name.startswith("ssl_")}


class Place(ABC):
    """Makes clients.

    Args:
        timeout: Seconds for connecting and for a reply.
    """

    def __init__(self, timeout: float) -> None:
        self._common: dict[str, Any] = {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "protocol": 2,
            "decode_responses": False,
            "max_connections": _MAX_CONNECTIONS,
        }

    is_cluster = False

    @abstractmethod
    def client(self) -> SyncRedis:
        """Return a new synchronous client.

        Raises:
            ConnectionError: No node of a cluster can be reached; its client asks for the others at once.
        """

    @abstractmethod
    def aclient(self) -> AsyncRedis:
        """Return a new asynchronous client."""

    async def aclose(self, client: AsyncRedis) -> None:
        """Close a client that `aclient` has made."""
        await client.aclose()


class _Url(Place):
    """One server, by its URL."""

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(timeout)
        self._url = url
        _ = urlsplit(url).port
        # Making a connection, without connecting, finds parameters that there are not.
        pool = redis.ConnectionPool.from_url(url, **self._common)
        pool.connection_class(**pool.connection_kwargs)

    def client(self) -> SyncRedis:
        return redis.Redis.from_url(self._url, retry=Retry(NoBackoff(), 0), **self._common)

    def aclient(self) -> AsyncRedis:
        return redis.asyncio.Redis.from_url(self._url, retry=AsyncRetry(NoBackoff(), 0), **self._common)


class _One(Place):
    """One server, by the settings of a client."""

    def __init__(self, connection_class: str, settings: dict[str, Any], timeout: float) -> None:
        super().__init__(timeout)
        self._class = connection_class
        self._settings = {n: v for n, v in settings.items() if n in _ONE_SERVER or n.startswith("ssl_")}

    def _class_in(self, module: Any) -> Any:
        found = getattr(module, self._class, None)
        if found is None:
            raise ConfigurationError(
                f"The Redis client uses connections of a class of its own ({self._class}): give a URL, or a client "
                "with redis-py's connections."
            )
        return found

    def client(self) -> SyncRedis:
        return redis.Redis(
            connection_pool=redis.ConnectionPool(
                connection_class=self._class_in(redis),
                retry=Retry(NoBackoff(), 0),
                **{**self._common, **self._settings},
            )
        )

    def aclient(self) -> AsyncRedis:
        return redis.asyncio.Redis.from_pool(
            redis.asyncio.ConnectionPool(
                connection_class=self._class_in(redis.asyncio),
                retry=AsyncRetry(NoBackoff(), 0),
                **{**self._common, **self._settings},
            )
        )


class _Cluster(Place):
    """A cluster, by some of its nodes; the others are found by asking them.

    After a failure a client asks who has the slot now, and tries once more: a replica may have taken over.
    """

    is_cluster = True

    def __init__(self, nodes: Iterable[Node], settings: dict[str, Any], timeout: float) -> None:
        super().__init__(timeout)
        self._nodes = list(nodes)
        # One slot without a master is not to stop the others.
        self._settings = {**self._common, "require_full_coverage": False, **settings}
        self.aclient()  # finds parameters that there are not

    def client(self) -> SyncRedis:
        nodes = [_ClusterNode(host, port) for host, port in self._nodes]
        try:
            return redis.RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 1), **self._settings)
        except RedisClusterException as exc:
            raise redis.ConnectionError(str(exc)) from exc

    def aclient(self) -> AsyncRedis:
        nodes = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in self._nodes]
        return redis.asyncio.RedisCluster(startup_nodes=nodes, retry=AsyncRetry(NoBackoff(), 1), **self._settings)


class _Sentinels(Place):
    """A master that sentinels watch; each new connection asks them which server that is now."""

    def __init__(
        self, nodes: Iterable[Node], service: str, settings: dict[str, Any], watch: dict[str, Any], timeout: float
    ) -> None:
        super().__init__(timeout)
        self._nodes = list(nodes)
        self._service = service
        self._settings = {**self._common, **settings}
        self._watch = {**self._common, **watch}
        redis.Redis(**self._watch)  # finds parameters that there are not
        redis.Redis(**self._settings)

    def client(self) -> SyncRedis:
        retry = {"retry": Retry(NoBackoff(), 0)}
        sentinel = _Sentinel(self._nodes, sentinel_kwargs=self._watch | retry)
        found: redis.Redis = sentinel.master_for(self._service, **self._settings, **retry)
        return found

    def aclient(self) -> AsyncRedis:
        retry = {"retry": AsyncRetry(NoBackoff(), 0)}
        sentinel = _AsyncSentinel(self._nodes, sentinel_kwargs=self._watch | retry)
        found: redis.asyncio.Redis = sentinel.master_for(self._service, **self._settings, **retry)
        return found

    async def aclose(self, client: AsyncRedis) -> None:
        await super().aclose(client)
        for watcher in client.connection_pool.sentinel_manager.sentinels:  # type: ignore[union-attr]  # made above
            await watcher.aclose()
