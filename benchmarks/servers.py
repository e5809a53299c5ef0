"""The servers of a run, and what they and the machine are.

Not here: the embedded servers themselves (`checkpointer/embedded.py`) and the way to them (`network.py`). A *place* is
where one load works: a database of its own and names of its own in Redis, both gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import redis
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from checkpointer import embedded

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = (
    "langgraph",
    "langgraph-checkpoint",
    "langgraph-checkpoint-buffered",
    "langgraph-checkpoint-postgres",
    "langgraph-checkpoint-sqlite",
    "langgraph-checkpoint-plainredis",
    "langgraph-checkpoint-aws",
    "langgraph-checkpoint-redis",
    "psycopg",
    "redis",
    "hiredis",
    "valkey",
)


@dataclass(frozen=True)
class Place:
    """See the module; every thread id and every prefix begins with `prefix`."""

    postgres_uri: str
    redis_url: str
    search_url: str | None
    folder: Path
    prefix: str

    def thread(self) -> str:
        """Return the id of a new thread."""
        return f"{self.prefix}-{uuid4()}"


@dataclass(frozen=True)
class Servers:
    """The addresses of a run; `search_url` is that of a Redis with JSON and Search, if there is one."""

    postgres_uri: str
    redis_url: str
    search_url: str | None = None

    @contextlib.contextmanager
    def place(self) -> Iterator[Place]:
        """Make a place, and remove it afterwards."""
        prefix = f"bench{uuid4().hex[:10]}"
        name = sql.Identifier(prefix)
        with psycopg.connect(self.postgres_uri, autocommit=True) as admin:
            admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(name))
        try:
            with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
                uri = make_conninfo(self.postgres_uri, dbname=prefix)
                yield Place(uri, self.redis_url, self.search_url, Path(folder), prefix)
        finally:
            with psycopg.connect(self.postgres_uri, autocommit=True) as admin:
                admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
            for url in filter(None, (self.redis_url, self.search_url)):
                with redis.Redis.from_url(url) as client:
                    for key in client.scan_iter(f"*{prefix}*", count=10_000):
                        client.unlink(key)


@contextlib.contextmanager
def serve(postgres_uri: str | None, redis_url: str | None, search_url: str | None) -> Iterator[Servers]:
    """Give the servers that are named, and private ones for what is not."""
    with contextlib.ExitStack() as stack:
        if not (postgres_uri and redis_url):
            own = stack.enter_context(embedded.servers())
            postgres_uri, redis_url = postgres_uri or own.postgres_uri, redis_url or own.redis_url
        yield Servers(postgres_uri, redis_url, search_url)


def address_of_postgres(uri: str) -> tuple[str, int]:
    """Return host and port."""
    found = conninfo_to_dict(uri)
    return str(found.get("host") or "127.0.0.1"), int(found.get("port") or 5432)


def address_of_redis(url: str) -> tuple[str, int]:
    """Return host and port."""
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 6379


def through(place: Place, postgres_port: int, redis_port: int) -> Place:
    """Return the same place by way of two local ports."""
    parts = urlsplit(place.redis_url)
    user = parts.netloc.rpartition("@")[0]
    netloc = f"{user}@127.0.0.1:{redis_port}" if user else f"127.0.0.1:{redis_port}"
    return Place(
        make_conninfo(place.postgres_uri, host="127.0.0.1", port=postgres_port),
        urlunsplit(parts._replace(netloc=netloc)),
        None,
        place.folder,
        place.prefix,
    )


def describe(servers: Servers) -> dict[str, str]:
    """Say what the numbers are measured on."""
    with psycopg.connect(servers.postgres_uri) as conn, redis.Redis.from_url(servers.redis_url) as client:
        names = ("fsync", "synchronous_commit", "shared_buffers", "wal_sync_method")
        number = conn.info.parameter_status("server_version")
        settings = [f"{name} {conn.execute(f'SHOW {name}'.encode()).fetchone()[0]}" for name in names]  # type: ignore[index]
        info: Any = client.info("server")
        append: Any = client.config_get("append*")
    kind, given = ("Valkey", info["valkey_version"]) if "valkey_version" in info else ("Redis", info["redis_version"])
    return {
        "machine": f"{os.cpu_count()} CPUs, {_processor()}, {platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(f"{name} {found}" for name in PACKAGES if (found := installed(name))),
        "postgres": ", ".join([f"PostgreSQL {number}", *settings]),
        "redis": f"{kind} {given}: appendonly {append['appendonly']}, appendfsync {append['appendfsync']}",
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }


def installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or "unknown processor"
