"""Measures the memory that a thread takes in Redis, by the size of its state, and how fast it is flushed.

Run it: python benchmarks/memory.py [--threads 300]   (private servers, durable settings; prints Markdown)

A *state* is a list of messages of about 250 bytes, which is one blob, written whole at every step as LangGraph does.
Each thread gets as many *steps* as a short run has: one `put` and one `put_writes` of a small value. *Dirty* is what
a thread takes with all of that still to be flushed, *clean* what stays as its read cache for `clean_ttl` afterwards:
differences of `used_memory`, divided by the number of threads. *Payload* is what the values come to when serialised.
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version
from typing import Any

import redis
from langgraph.checkpoint.base import create_checkpoint, empty_checkpoint

from checkpointer import BufferedPostgresSaver, embedded

STEPS = 5
SIZES = (0, 1, 5, 20, 100, 400)  # KB of state


def fill(saver: Any, threads: list[str], kilobytes: int) -> int:
    """Put so many steps into each thread; returns the bytes of one thread's values."""
    payload = 0
    for thread in threads:
        config: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
        checkpoint = empty_checkpoint()
        payload = 0
        for step in range(STEPS):
            messages = [f"{step} {i:04} ".ljust(250, "x") for i in range(kilobytes * 4)]
            checkpoint = create_checkpoint(checkpoint, None, step)
            checkpoint["channel_values"] = {"messages": messages} if kilobytes else {"count": step}
            name = "messages" if kilobytes else "count"
            checkpoint["channel_versions"] = {name: f"{step:032}.0"}
            config = saver.put(config, checkpoint, {"source": "loop", "step": step}, checkpoint["channel_versions"])
            saver.put_writes(config, [("branch:to:agent", None)], f"task-{step}")
            payload += len(saver.serde.dumps_typed(checkpoint["channel_values"])[1])
    return payload


def used(client: redis.Redis) -> int:
    """Return the server's memory in use."""
    return int(client.info("memory")["used_memory"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=300, help="threads for each size")
    count = parser.parse_args().threads
    with embedded.servers() as pair, redis.Redis.from_url(pair.redis_url) as client:
        server = client.info("server")
        print(
            f"langgraph-checkpoint-buffered {version('langgraph-checkpoint-buffered')}, "
            f"{server.get('server_name', 'redis')} {server.get('valkey_version', server['redis_version'])}, "
            f"Python {platform.python_version()}; {count} threads of {STEPS} steps for each row.\n"
        )
        print("| state KB | payload of 5 steps KB | dirty KB | clean KB | flushed threads/s | flushed MB/s |")
        print("|---|---|---|---|---|---|")
        settings: Any = {"hooks": (), "triggers": frozenset(), "high_water_bytes": 1 << 40, "high_water_age": 86_400.0}
        with BufferedPostgresSaver.from_conn_string(pair.postgres_uri, redis_url=pair.redis_url, **settings) as saver:
            saver.setup()
            for size in SIZES:
                threads = [f"{size}-{i:032}" for i in range(count)]
                fill(saver, threads[:1], size)  # scripts and partitions are there afterwards
                saver.flush()
                before = used(client)
                payload = fill(saver, threads[1:], size)
                dirty = used(client)
                begun = time.monotonic()
                report = saver.flush()
                seconds = time.monotonic() - begun
                assert report, report
                n = count - 1
                print(
                    f"| {size} | {payload / 1024:.1f} | {(dirty - before) / n / 1024:.1f} "
                    f"| {(used(client) - before) / n / 1024:.1f} | {n / seconds:.0f} "
                    f"| {payload * n / seconds / 2**20:.1f} |"
                )


if __name__ == "__main__":
    main()
