"""A target on real servers, with its tables and with a spool folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from checkpointer.hooks import HookContext
from observability import Observability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIGRATIONS = Path(__file__).parents[2] / "migrations"


def _migrate(uri: str) -> None:
    with psycopg.connect(uri, autocommit=True) as connection:
        for path in sorted(MIGRATIONS.glob("*.sql")):
            connection.execute(path.read_bytes())


def _context(postgres_uri: str, redis_url: str, prefix: str) -> HookContext:
    return HookContext(
        connect_postgres=lambda: psycopg.connect(postgres_uri, autocommit=True, connect_timeout=3),
        connect_redis=lambda: redis.Redis.from_url(
            redis_url, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        ),
        prefix=prefix,
        identity=f"test-{prefix}",
    )


@pytest.fixture
def spool_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spool"
    monkeypatch.setenv("CHECKPOINTER_SPOOL_DIR", str(folder))
    return folder


@pytest.fixture
def migrated_uri(postgres_uri: str) -> str:
    _migrate(postgres_uri)
    return postgres_uri


@pytest.fixture
def context(migrated_uri: str, redis_url: str, prefix: str, spool_dir: Path) -> HookContext:
    return _context(migrated_uri, redis_url, prefix)


@pytest.fixture
def target(context: HookContext) -> Iterator[Observability]:
    made = Observability(context)
    yield made
    made.close(5)


@pytest.fixture
def own_context(own_servers: Any, prefix: str, spool_dir: Path) -> HookContext:
    """A target on servers of this test's own."""
    _migrate(own_servers.postgres_uri)
    return _context(own_servers.postgres_uri, own_servers.redis_url, prefix)


@pytest.fixture
def own_target(own_context: HookContext) -> Iterator[Observability]:
    made = Observability(own_context)
    yield made
    made.close(5)


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """Read a table, in the order in which the rows arrived."""

    def read(context: HookContext, table: str = "system_errors") -> list[dict[str, Any]]:
        with context.connect_postgres() as connection, connection.cursor() as cursor:
            cursor.row_factory = psycopg.rows.dict_row
            return cursor.execute(f"SELECT * FROM {table} ORDER BY id".encode()).fetchall()

    return read
