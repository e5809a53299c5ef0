"""Reports that have not reached Postgres yet: how many wait in this user's spool files and in Redis.

Not here: moving them on (`outbox.py`), which every saver and every process that reports something does by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from observability.errors import SYSTEM_ERRORS
from observability.errors.recoveries import RECOVERIES
from observability.logs import THREAD_LOGS
from observability.outbox import stream_key
from observability.spool import backlog as spooled

if TYPE_CHECKING:
    import redis

__all__ = ["spooled", "streamed"]


def streamed(client: redis.Redis | redis.RedisCluster, prefix: str) -> int:
    """Return how many rows wait in Redis.

    Raises:
        redis.RedisError: Redis does not say.
    """
    lengths: list[Any] = [client.xlen(stream_key(prefix, table)) for table in (SYSTEM_ERRORS, THREAD_LOGS, RECOVERIES)]
    return sum(lengths)
