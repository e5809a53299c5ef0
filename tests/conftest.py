"""Real servers for the tests: a pair for the session, an empty database and a Redis prefix for each test."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
import redis
from helpers import with_database
from hypothesis import HealthCheck, settings
from psycopg import sql
from savers import NOTHING, Recording

from checkpointer import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# No test depends on speed, neither of what is tested nor of what makes up the examples.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


# A shell has its background jobs ignore Ctrl-C, and `nohup` the end of the terminal; so would all programs that tests
# start and end by these.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@dataclass(frozen=True)
class Addresses:
    postgres_uri: str
    redis_url: str


@pytest.fixture(scope="session", autouse=True)
def _spool_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Error reports that find no server go to a folder of this session, not to the user's."""
    before = os.environ.get("CHECKPOINTER_SPOOL_DIR")
    os.environ["CHECKPOINTER_SPOOL_DIR"] = str(tmp_path_factory.mktemp("spool"))
    yield
    if before is None:
        del os.environ["CHECKPOINTER_SPOOL_DIR"]
    else:
        os.environ["CHECKPOINTER_SPOOL_DIR"] = before


def _use_other_programs(patch: pytest.MonkeyPatch) -> None:
    """Have servers started from TEST_POSTGRES_BIN (a folder) and TEST_REDIS_SERVER (a program), where they are set.

    Only the tests need this, to prove what is said of older servers: so it is a patch here and no option there.
    """
    folder, redis_server = os.environ.get("TEST_POSTGRES_BIN"), os.environ.get("TEST_REDIS_SERVER")
    of_wheels = embedded._programs

    def programs(copies: Path, run_as: embedded._Identity) -> embedded._Programs:
        found = of_wheels(copies, run_as)
        if folder:
            found = replace(found, postgres=Path(folder, "postgres"), initdb=Path(folder, "initdb"))
        return replace(found, valkey=Path(redis_server)) if redis_server else found

    patch.setattr(embedded, "_programs", programs)


@pytest.fixture(scope="module", autouse=True)
def server_programs() -> Iterator[None]:
    """The programs that the tests of a file start."""
    with pytest.MonkeyPatch.context() as patch:
        _use_other_programs(patch)
        yield


@pytest.fixture(scope="session")
def servers() -> Iterator[Addresses]:
    """The servers that POSTGRES_URI and REDIS_URL name; private ones for what is not named."""
    postgres_uri, redis_url = os.environ.get("POSTGRES_URI"), os.environ.get("REDIS_URL")
    with ExitStack() as stack:
        if not (postgres_uri and redis_url):
            with pytest.MonkeyPatch.context() as patch:
                _use_other_programs(patch)
                own = stack.enter_context(embedded.servers())
            postgres_uri, redis_url = postgres_uri or own.postgres_uri, redis_url or own.redis_url
        yield Addresses(postgres_uri, redis_url)


@pytest.fixture
def postgres_uri(servers: Addresses) -> Iterator[str]:
    """The connection string of a fresh, empty database."""
    name = f"test_{uuid4().hex}"
    with psycopg.connect(servers.postgres_uri, autocommit=True) as admin:
        # From template0, since CREATE DATABASE fails while anything is connected to its template.
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(sql.Identifier(name)))
    yield with_database(servers.postgres_uri, name)
    with psycopg.connect(servers.postgres_uri, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def redis_url(servers: Addresses) -> str:
    """The URL of a Redis that other tests use too: keep to keys that start with `prefix`."""
    return servers.redis_url


@pytest.fixture
def prefix(redis_url: str) -> Iterator[str]:
    """A key prefix of this test's own; keys `prefix:*` are deleted after it."""
    name = f"t{uuid4().hex[:12]}"
    yield name
    with redis.Redis.from_url(redis_url) as client:
        for key in client.scan_iter(f"{name}:*", count=1000):
            client.unlink(key)


@pytest.fixture
def own_servers() -> Iterator[embedded.Servers]:
    """A pair of servers of this test's own, to kill, pause and restart."""
    # Synced before the answer: with everysec a slow disk lets Redis postpone the write, which SIGKILL then loses.
    with embedded.servers(valkey_args=("--appendfsync", "always")) as pair:
        yield pair


@pytest.fixture
def conn(postgres_uri: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the test's database, around the savers."""
    with psycopg.connect(postgres_uri, autocommit=True) as found:
        yield found


@pytest.fixture
def make(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[Callable[..., Recording]]:
    """Makes savers that keep their events, and flush only when told to."""
    savers: list[Recording] = []

    def _make(**options: Any) -> Recording:
        defaults = {"hooks": (), "prefix": prefix, "triggers": NOTHING}
        saver = Recording(postgres_uri, redis_url, **{**defaults, **options})
        savers.append(saver)
        saver.setup()
        return saver

    yield _make
    for saver in savers:
        saver.close()
