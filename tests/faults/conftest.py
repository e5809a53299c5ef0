"""Savers on a pair of servers that belongs to one test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from savers import Recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
