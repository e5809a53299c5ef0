"""Savers on a pair of servers that belongs to one test, and benches for the fault tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bench import Bench
from savers import Recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from checkpointer.embedded import Servers


@pytest.fixture
def open_saver(own_servers: Servers) -> Iterator[Callable[..., Recording]]:
    """Makes savers that keep their events, and closes them."""
    opened: list[Recording] = []

    def make(**options: Any) -> Recording:
        defaults = {"hooks": (), "postgres_timeout": 1.0, "redis_timeout": 1.0, "close_timeout": 2.0}
        saver = Recording(own_servers.postgres_uri, own_servers.redis_url, **{**defaults, **options})
        opened.append(saver)
        saver.setup()
        return saver

    yield make
    for saver in opened:
        saver.close()


@pytest.fixture
def bench(postgres_uri: str, redis_url: str, prefix: str, tmp_path: Path) -> Iterator[Bench]:
    """A bench whose network can fail; the servers are others' too."""
    made = Bench(postgres_uri, redis_url, prefix, tmp_path)
    yield made
    made.close()


@pytest.fixture
def own_bench(own_servers: Servers, tmp_path: Path) -> Iterator[Bench]:
    """A bench on `own_servers`, to kill and to pause."""
    made = Bench(own_servers.postgres_uri, own_servers.redis_url, "checkpointer", tmp_path)
    yield made
    made.close()
