"""What the process does that a test kills or stops in the middle of a flush: it runs a graph, and flushes often."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from audit import Log, RecordingSaver
from fault_graph import aturn, turn

THREAD = "of-the-child"


def run(postgres_uri: str, redis_url: str, prefix: str, log: str, asynchronous: bool) -> None:
    # What the test holds back must not count as an outage, after which reads wait for the flush.
    patience: Any = {"redis_timeout": 60.0, "query_timeout": 60.0}
    saver: Any = RecordingSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), flush_age=0.02, flush_size=30, **patience
    )
    saver.log = Log(Path(log))
    saver.setup()
    while True:
        # Short histories keep the audit short.
        if asynchronous:
            asyncio.run(aturn(saver, THREAD))
        else:
            turn(saver, THREAD)
