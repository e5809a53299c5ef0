"""Several processes run graphs while a monkey kills, stops and cuts off things at random; then the books are audited.

    python tests/faults/torture.py --minutes 10 --seed 1

Not here: what the processes do (`torture_child.py`) and what counts as lost (`audit.py`). The servers are this
program's own. Valkey writes its file at each command (`appendfsync always`), so whatever was acknowledged survives its
death too. The seed decides what the monkey does and what the lanes choose; how that falls together in time, nobody
does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torture_child
from audit import Books, Findings, audit
from helpers import wait_until
from proxy import Proxy, proxied

from checkpointer import BufferedPostgresSaver, embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKERS = 3


@dataclass
class Result:
    """What a torture came to."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    went_back: list[str] = field(default_factory=list)
    behind_the_dead: list[str] = field(default_factory=list)
    """Reads, with Postgres away, behind what a killed process had put around Redis; the guarantees leave that open."""
    books: Books = field(default_factory=Books)
    findings: Findings = field(default_factory=Findings)
    found_in_buffer: int = 0

    @property
    def is_good(self) -> bool:
        return not (self.findings or self.failures or self.went_back)

    def __str__(self) -> str:
        def counted(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"

        return "\n".join(
            [
                f"seed {self.seed}: {self.books.puts} puts and {self.books.writes} writes acknowledged, on "
                f"{len(self.books.threads)} threads; {self.found_in_buffer} checkpoints were in the buffer at the end",
                f"faults: {counted(self.faults)}",
                f"errors that runs saw: {counted(self.errors)}",
                f"events: {counted(self.events)}",
                f"reads that went back: {len(self.went_back)}" + "".join(f"\n    {one}" for one in self.went_back[:5]),
                f"reads behind what a killed process had put around Redis: {len(self.behind_the_dead)}",
                f"other exceptions: {len(self.failures)}" + "".join(f"\n{one}" for one in self.failures[:3]),
                str(self.findings),
            ]
        )


class Torture:
    """The servers, the workers and the monkey."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.result = Result(seed)
        self._rng = random.Random(seed)
        self._folder = folder
        self._stop = folder / "stop"
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torture_child"])
        self._workers: list[Any] = []
        self._addresses: list[tuple[str, str]] = []
        self._proxies: list[tuple[Proxy, Proxy]] = []
        self._lives = 0

    def run(self, seconds: float) -> Result:
        with ExitStack() as stack:
            self._servers = stack.enter_context(embedded.servers(valkey_args=["--appendfsync", "always"]))
            uri, url = self._servers.postgres_uri, self._servers.redis_url
            with BufferedPostgresSaver.from_conn_string(uri, redis_url=url, hooks=()) as saver:
                saver.setup()
            self._admin = stack.enter_context(redis.Redis.from_url(url, socket_timeout=5))
            stack.callback(self._end_workers)
            for number in range(WORKERS):
                postgres_uri, postgres = stack.enter_context(proxied(uri))
                redis_url, buffer = stack.enter_context(proxied(url))
                self._addresses.append((postgres_uri, redis_url))
                self._proxies.append((postgres, buffer))
                self._workers.append(self._start(number))
            end = time.monotonic() + seconds
            faults = self._faults()
            while time.monotonic() < end:
                time.sleep(self._rng.uniform(0.1, 0.8))
                name, fault = self._rng.choice(faults)
                self.result.faults[name] += 1
                fault()
                for number, worker in enumerate(self._workers):
                    if not worker.is_alive():
                        self._workers[number] = self._start(number)
            self._stop.touch()
            for worker in self._workers:
                worker.join(60)
                if worker.is_alive():
                    self.result.failures.append(f"process {worker.pid} did not end within 60 s of being told to")
            self._audit(uri, url)
        return self.result

    def _start(self, number: int) -> Any:
        self._lives += 1
        worker = self._context.Process(
            target=torture_child.run,
            args=(number, number % 2 == 1, self.result.seed + self._lives, str(self._folder), *self._addresses[number]),
        )
        worker.start()
        return worker

    def _end_workers(self) -> None:
        for worker in self._workers:
            with suppress(ValueError, AttributeError):
                worker.kill()
                worker.join()

    # -- the monkey ----------------------------------------------------------------------------------------------

    def _faults(self) -> list[tuple[str, Callable[[], None]]]:
        valkey, postgres = self._servers.valkey, self._servers.postgres

        def killed(server: embedded.Server) -> None:
            server.kill()
            self._wait(0.0, 1.5)
            server.start()

        def paused(server: embedded.Server, longest: float) -> None:
            server.pause()
            self._wait(0.1, longest)
            server.resume()

        def immediate_shutdown() -> None:
            if postgres.pid:
                os.kill(postgres.pid, signal.SIGQUIT)
            wait_until(lambda: not postgres.is_alive())
            postgres.start()

        def full() -> None:
            self._admin.config_set("maxmemory", "1")
            self._wait(0.1, 1.0)
            self._admin.config_set("maxmemory", "0")

        def delayed() -> None:
            proxy = self._one()[1]
            proxy.request_delay, proxy.reply_delay = self._rng.uniform(0, 0.3), self._rng.uniform(0, 0.3)
            self._wait(0.3, 1.5)
            proxy.request_delay = proxy.reply_delay = 0.0

        def for_a_while(fail: Callable[[], None], proxy: Proxy) -> None:
            fail()
            self._wait(0.1, 1.5)
            proxy.allow()

        def silenced() -> None:
            proxy = self._one()[1]
            for_a_while(lambda: proxy.silence(new_ones=True), proxy)

        def refused(tier: int) -> None:
            proxy = self._one()[tier]
            for_a_while(proxy.refuse, proxy)

        def both_refused() -> None:
            postgres, buffer = self._one()
            postgres.refuse()
            for_a_while(buffer.refuse, buffer)
            postgres.allow()

        def reply_lost() -> None:
            self._one()[self._rng.randrange(2)].cut_reply(after=self._rng.choice((0, 0, 3, 50)))

        return [
            ("worker killed", self._kill_worker),
            ("worker killed", self._kill_worker),
            ("worker stopped", self._stop_worker),
            ("redis killed", lambda: killed(valkey)),
            ("redis paused", lambda: paused(valkey, 2.5)),
            ("redis full", full),
            ("redis slow", delayed),
            ("redis silent", silenced),
            ("redis refused", lambda: refused(1)),
            ("redis cut", lambda: self._one()[1].cut()),
            ("reply lost", reply_lost),
            ("reply lost", reply_lost),
            ("postgres killed", lambda: killed(postgres)),
            ("postgres paused", lambda: paused(postgres, 3.0)),
            ("postgres shut down", immediate_shutdown),
            ("postgres restarted", postgres.restart),
            ("postgres refused", lambda: refused(0)),
            ("postgres cut", lambda: self._one()[0].cut()),
            ("both refused", both_refused),
        ]

    def _wait(self, shortest: float, longest: float) -> None:
        time.sleep(self._rng.uniform(shortest, longest))

    def _one(self) -> tuple[Proxy, Proxy]:
        return self._rng.choice(self._proxies)

    def _kill_worker(self) -> None:
        worker = self._rng.choice(self._workers)
        worker.kill()
        worker.join()

    def _stop_worker(self) -> None:
        worker = self._rng.choice(self._workers)
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGSTOP)
            self._wait(0.1, 2.0)
            os.kill(worker.pid, signal.SIGCONT)

    # -- the audit -----------------------------------------------------------------------------------------------

    def _audit(self, postgres_uri: str, redis_url: str) -> None:
        result = self.result
        with BufferedPostgresSaver.from_conn_string(
            postgres_uri, redis_url=redis_url, hooks=(), triggers=frozenset()
        ) as saver:
            report = wait_until(saver.flush, timeout=60)
            result.found_in_buffer = report.checkpoints
        # What the process that reads has put itself, since it was started.
        own: dict[str, str] = {}
        for line in self._lines():
            result.books.read([line])
            kind, *rest = line
            if kind == "error":
                result.errors[rest[0]] += 1
            elif kind == "event":
                result.events[rest[0]] += 1
                if rest[0] == "checkpoint.lost":
                    result.failures.append(f"an event says that checkpoints are lost: {rest}")
            elif kind == "failure":
                result.failures.append(rest[0])
            elif kind == "start":
                own.clear()
            elif kind in ("try_delete", "delete"):
                own.pop(rest[0], None)
            elif kind == "put" and not rest[1]:
                own[rest[0]] = max(own.get(rest[0], ""), rest[2])
            elif kind == "seen":
                thread = result.books.threads[rest[0]]
                newest = max((checkpoint for ns, checkpoint in thread.puts if not ns), default="")
                what = f"{rest[0]}: read {rest[1] or 'nothing'} after {newest} was acknowledged"
                if rest[1] < own.get(rest[0], ""):
                    result.went_back.append(what)
                elif rest[1] < newest:
                    result.behind_the_dead.append(what)
        result.findings = audit(postgres_uri, result.books)

    def _lines(self) -> Iterator[list[Any]]:
        for path in sorted(self._folder.glob("*.log")):
            for text in path.read_text().splitlines():
                yield json.loads(text)


def torture(seconds: float, seed: int) -> Result:
    """Run one; the result says what was wrong."""
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        return Torture(seed, Path(folder)).run(seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    outcome = torture(arguments.minutes * 60, arguments.seed)
    print(outcome)
    sys.exit(not outcome.is_good)
