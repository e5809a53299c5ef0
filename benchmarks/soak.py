"""Keeps a steady load up for long, and shows whether anything grows: memory, connections, what waits.

Run it: python -m benchmarks.soak [--minutes 30] [--rate 400] [--output DIR]   (private servers, unless given)

One process with one saver and its standard hooks makes *runs*, each a thread of its own that reads, and then puts 20
checkpoints of 20 messages with their writes; at its end the saver is told, as LangChain's callbacks do. The *rate* is
in checkpoints a second; runs begin evenly spread. Every *sample* looks at the process (resident memory, open files),
at Redis (memory in use), at Postgres (connections), and at what waits to be flushed. Growth compares the median of the
last third of the samples with that of the second third: in the first, caches fill.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import redis
from matplotlib.figure import Figure

from benchmarks import servers
from benchmarks.lab import Face, root_run
from benchmarks.scale import MB
from benchmarks.states import Run, messages
from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.servers import Place

STEPS = 20
_CLEAN_TTL = 180.0
"""Seconds: so short that the heads that Redis keeps of idle threads come to their final number within the first third.
With the default, an hour, they would do so after an hour."""


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment.

    Attributes:
        seconds: Since the begin.
        put: Checkpoints put so far.
        waiting: Checkpoints of these that are not in Postgres yet.
        process_mb: Resident memory of this process.
        files: Its open files.
        redis_mb: Memory in use in Redis.
        connections: Connections to the database.
    """

    seconds: float
    put: int
    waiting: int
    process_mb: float
    files: int
    redis_mb: float
    connections: int


class Soak:
    """One soak.

    Args:
        place: Where.
        rate: Checkpoints a second.
    """

    def __init__(self, place: Place, rate: float) -> None:
        self._place = place
        self._rate = rate
        self._put = 0
        self._failed: BaseException | None = None

    async def run(self, seconds: float, every: float) -> list[Sample]:
        """Keep the load up; returns the samples.

        Raises:
            RuntimeError: A run or the last flush has failed.
        """
        samples = []
        async with AsyncExitStack() as stack:
            saver = await stack.enter_async_context(
                BufferedPostgresSaver.from_conn_string(
                    self._place.postgres_uri,
                    redis_url=self._place.redis_url,
                    prefix=self._place.prefix,
                    clean_ttl=_CLEAN_TTL,
                )
            )
            await saver.asetup()
            begun = time.monotonic()
            runs: set[asyncio.Task[None]] = set()
            started, next_sample = 0, every
            while (now := time.monotonic() - begun) < seconds and self._failed is None:
                while started * STEPS < now * self._rate:
                    started += 1
                    task = asyncio.create_task(self._run(Face(saver, "async")))
                    runs.add(task)
                    task.add_done_callback(runs.discard)
                if now >= next_sample:
                    next_sample += every
                    samples.append(await asyncio.to_thread(self._look, saver, now))
                    print(_row(samples[-1]), flush=True)
                await asyncio.sleep(0.01)
            await asyncio.gather(*runs)
            report = await saver.aflush()
            if self._failed is not None or not report:
                raise RuntimeError(f"the soak has failed: {report}") from self._failed
        return samples

    async def _run(self, face: Face) -> None:
        try:
            run = Run(face, self._place.thread(), messages())
            with root_run(run.thread_id, uuid4()):
                await run.start()
                for _ in range(STEPS):
                    await run.put_next()
                    self._put += 1
                    await run.put_writes()
                    await asyncio.sleep(0)
        except Exception as exc:  # noqa: BLE001 - ends the soak, which says so
            self._failed = exc

    def _look(self, saver: BufferedPostgresSaver, now: float) -> Sample:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with redis.Redis.from_url(self._place.redis_url) as client, psycopg.connect(self._place.postgres_uri) as conn:
            info: Any = client.info("memory")
            row = conn.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchone()
        return Sample(
            round(now, 1),
            self._put,
            # There is no public count of what was flushed, and counting rows would burden Postgres.
            self._put - saver._core.flusher.totals.checkpoints,
            round(pages * os.sysconf("SC_PAGE_SIZE") / MB, 1),
            len(os.listdir("/proc/self/fd")),
            round(info["used_memory"] / MB, 1),
            row[0] if row else 0,
        )


COLUMNS = ("seconds", "put", "waiting", "process_mb", "files", "redis_mb", "connections")


def _row(sample: Sample) -> str:
    return "| " + " | ".join(f"{getattr(sample, name):,}" for name in COLUMNS) + " |"


def growth(samples: Sequence[Sample], name: str) -> float:
    """Return by how much the last third's median is above the second third's, as a share of it."""
    third = len(samples) // 3
    if not third:
        return 0.0
    before = statistics.median(getattr(sample, name) for sample in samples[third : 2 * third])
    after = statistics.median(getattr(sample, name) for sample in samples[2 * third :])
    return after / before - 1 if before else 0.0


def _draw(samples: Sequence[Sample], path: Path) -> None:
    figure = Figure(figsize=(8, 6), layout="constrained", facecolor="white")
    axes = figure.subplots(3, 1, sharex=True)
    minutes = [sample.seconds / 60 for sample in samples]
    for place, (names, label) in zip(
        axes,
        (
            (("process_mb", "redis_mb"), "MB"),
            (("connections", "files"), "connections, files"),
            (("waiting",), "checkpoints"),
        ),
        strict=True,
    ):
        for name in names:
            place.plot(minutes, [getattr(sample, name) for sample in samples], label=name.replace("_mb", ""))
        place.set_ylim(bottom=0)
        place.set_ylabel(label)
        place.grid(axis="y", color="#dddddd", linewidth=0.6)
        place.legend(loc="lower right")
    axes[-1].set_xlabel("minutes")
    figure.savefig(path)


def main() -> None:
    """Soak, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=400.0, help="checkpoints a second")
    parser.add_argument("--postgres-uri")
    parser.add_argument("--redis-url")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    seconds = given.minutes * 60
    with servers.serve(given.postgres_uri, given.redis_url, None) as found, found.place() as place:
        facts = servers.describe(found)
        for name, value in facts.items():
            print(f"- {name}: {value}")
        print("\n| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        samples = asyncio.run(Soak(place, given.rate).run(seconds, max(1.0, seconds / 60)))
    grown = {name: growth(samples, name) for name in COLUMNS[3:]}
    print("\nGrowth from the second to the last third: " + ", ".join(f"{n} {v:+.1%}" for n, v in grown.items()))
    rate = samples[-1].put / samples[-1].seconds
    print(f"{samples[-1].put:,} checkpoints, {rate:.0f} a second; everything is in Postgres.")
    (given.output / "soak.json").write_text(
        json.dumps({"facts": facts, "rate": given.rate, "samples": [asdict(s) for s in samples], "growth": grown})
    )
    _draw(samples, given.output / "soak.svg")


if __name__ == "__main__":
    main()
