"""Several processes report errors as fast as they can while Postgres is restarted; then the store is audited.

    python tests/faults/error_store_fire.py --processes 4 --events 50000 --restarts 2 --seed 1

All of them share one database, one Redis, one spool file and the groups that their errors belong to. Meanwhile an
administrator resolves groups. In the end each error is counted once, groups and hours equal a recount of the rows, the
server never met a deadlock, and what is over is resolved. Every second restart is a SIGKILL, and Redis is killed while
Postgres is away. Not here: what the processes do (`error_store_child.py`). The servers are this program's own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import error_store_child
from helpers import wait_until

from checkpointer import BufferedPostgresSaver, embedded
from observability import Observability
from observability.backlog import streamed
from observability.errors import retention

if TYPE_CHECKING:
    from checkpointer.hooks import HookContext

_PATIENCE = 600.0
# So many errors are reported while Postgres is away, and as many while both are.
_AWAY = 400

_WORST = """(ARRAY['info', 'warning', 'error', 'critical'])[
    max(array_position(ARRAY['info', 'warning', 'error', 'critical'], severity))]"""

# Each finds what contradicts the claim.
AUDIT = {
    "a group differs from a recount": f"""
        SELECT fingerprint, g.occurrences, g.first_seen_at, g.last_seen_at, g.severity, counted.*
        FROM system_error_groups g FULL JOIN (
            SELECT fingerprint, sum(occurrences) AS occurrences, min(created_at) AS first_seen_at,
                max(coalesce(last_seen_at, created_at)) AS last_seen_at, {_WORST} AS severity
            FROM system_errors GROUP BY fingerprint
        ) counted USING (fingerprint)
        WHERE (g.occurrences, g.first_seen_at, g.last_seen_at, g.severity)
            IS DISTINCT FROM (counted.occurrences, counted.first_seen_at, counted.last_seen_at, counted.severity)""",
    "an hour differs from a recount": """
        SELECT hour, error_type, severity, fingerprint, h.occurrences, counted.occurrences
        FROM system_error_hourly h FULL JOIN (
            SELECT date_trunc('hour', created_at, 'UTC') AS hour, error_type, severity, fingerprint,
                sum(occurrences) AS occurrences
            FROM system_errors GROUP BY 1, 2, 3, 4
        ) counted USING (hour, error_type, severity, fingerprint)
        WHERE h.occurrences IS DISTINCT FROM counted.occurrences""",
    "a row is over and unresolved": """
        SELECT e.id, e.recovery_key, e.created_at, r.recovered_at
        FROM system_errors e JOIN system_error_recoveries r USING (recovery_key)
        WHERE e.resolved_at IS NULL AND coalesce(e.last_seen_at, e.created_at) <= r.recovered_at""",
    "a row is resolved by a recovery that came before it": """
        SELECT id, created_at, last_seen_at, resolved_at FROM system_errors
        WHERE resolved_by = 'system' AND resolved_at < coalesce(last_seen_at, created_at)""",
    "a row that was resolved by itself has no single line in the audit": """
        SELECT e.id, count(a.id) FROM system_errors e
        LEFT JOIN system_error_audit a ON a.error_id = e.id AND a.action = 'resolve'
        WHERE e.resolved_by = 'system' GROUP BY e.id HAVING count(a.id) <> 1""",
    "a group is resolved after which something of it happened": """
        SELECT fingerprint, resolved_at, last_seen_at FROM system_error_groups
        WHERE status = 'resolved' AND last_seen_at > resolved_at""",
    "a group has regressed although nothing of it happened since": """
        SELECT fingerprint, resolved_at, last_seen_at FROM system_error_groups
        WHERE status = 'regressed' AND last_seen_at <= resolved_at""",
    "a regression has no single line in the audit": """
        SELECT fingerprint, g.regressions, count(a.id) FROM system_error_groups g
        LEFT JOIN system_error_audit a USING (fingerprint) WHERE a.action IS NULL OR a.action = 'regress'
        GROUP BY fingerprint, g.regressions HAVING count(a.id) <> g.regressions""",
}

_RESOLVE = """
WITH given AS (SELECT fingerprint FROM system_error_groups WHERE fingerprint = ANY(%(groups)s)), rows AS (
    UPDATE system_errors SET resolved_at = statement_timestamp(), resolved_by = 'ann'
    WHERE fingerprint IN (SELECT fingerprint FROM given) AND resolved_at IS NULL
)
UPDATE system_error_groups SET status = 'resolved', resolved_at = statement_timestamp(), resolved_by = 'ann'
WHERE fingerprint IN (SELECT fingerprint FROM given)
"""


@dataclass
class Result:
    """What a fire came to."""

    seed: int
    processes: int
    events: int
    restarts: int = 0
    seconds: float = 0.0
    reported: Counter[tuple[str, ...]] = field(default_factory=Counter)
    stored: Counter[tuple[str, ...]] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    deliveries: Counter[str] = field(default_factory=Counter)
    acts: int = 0
    deadlocks: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        def counted(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"

        return "\n".join(
            [
                f"seed {self.seed}: {self.processes} processes reported {self.reported.total()} errors in "
                f"{self.seconds:.0f} s ({self.reported.total() / self.seconds:.0f}/s); Postgres was restarted "
                f"{self.restarts} times, an administrator acted {self.acts} times",
                f"ways: {counted(self.ways)}",
                f"rows by delivery: {counted(self.deliveries)}",
                ", ".join(f"{name} {count}" for name, count in self.counts.items()),
                f"counted in rows: {self.stored.total()} of {self.reported.total()}; deadlocks: {self.deadlocks}",
                "everything is as claimed"
                if self.is_good
                else f"{len(self.failures)} FAILURES:\n" + "\n".join(self.failures[:20]),
            ]
        )


class Fire:
    """The servers, the processes, the administrator and the audit."""

    def __init__(self, result: Result, folder: Path) -> None:
        self.result = result
        self._folder = folder
        self._over = threading.Event()

    def run(self) -> None:
        result = self.result
        with embedded.servers(valkey_args=["--appendfsync", "always"]) as servers:
            self._servers = servers
            with BufferedPostgresSaver.from_conn_string(
                servers.postgres_uri, redis_url=servers.redis_url, hooks=()
            ) as saver:
                saver.setup()
            target = error_store_child.context_of(servers.postgres_uri, servers.redis_url)
            administrator = threading.Thread(target=self._administrate, args=(target,))
            administrator.start()
            begun = time.monotonic()
            try:
                self._report()
            finally:
                self._over.set()
                administrator.join()
            result.seconds = time.monotonic() - begun
            self._deliver_the_rest(target)
            self._audit(target)

    def _report(self) -> None:
        result = self.result
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["error_store_child"])
        progress = context.Array("L", result.processes)
        addresses = (self._servers.postgres_uri, self._servers.redis_url)
        processes = [
            context.Process(
                target=error_store_child.run,
                args=(number, result.events, result.seed, str(self._folder), *addresses, progress),
            )
            for number in range(result.processes)
        ]
        for process in processes:
            process.start()
        try:
            self._restart(processes, progress)
            for process in processes:
                process.join(_PATIENCE)
                if process.exitcode != 0:
                    result.failures.append(f"process {process.pid} ended with {process.exitcode}")
        finally:
            for process in processes:
                process.kill()
        for path in self._folder.glob("*.json"):
            books, ways = json.loads(path.read_text())
            result.reported.update({tuple(key): n for *key, n in books})
            result.ways.update(ways)

    def _restart(self, processes: list[Any], progress: Any) -> None:
        """Restart Postgres when shares of the errors have been reported."""
        result, postgres, valkey = self.result, self._servers.postgres, self._servers.valkey
        whole = result.processes * result.events

        def wait_for(count: int) -> None:
            wait_until(
                lambda: sum(progress) >= count or not any(one.is_alive() for one in processes), timeout=_PATIENCE
            )

        for number in range(1, result.restarts + 1):
            share = whole * number // (result.restarts + 1)
            wait_for(share)
            if sum(progress) >= whole:
                result.failures.append(f"restart {number} came too late to show anything")
            if number % 2:
                postgres.kill()
                wait_for(sum(progress) + _AWAY)
                valkey.kill()
                wait_for(sum(progress) + _AWAY)
                valkey.start()
                postgres.start()
            else:
                postgres.restart()

    def _administrate(self, target: HookContext) -> None:
        """Resolve groups, each with its rows, as an administrator does; and delete what is old."""
        rng = random.Random(self.result.seed)
        while not self._over.wait(0.02):
            with suppress(psycopg.OperationalError), target.connect_postgres() as connection:
                found = [name for (name,) in connection.execute("SELECT fingerprint FROM system_error_groups")]
                chosen = sorted(rng.sample(found, min(3, len(found))))
                with connection.transaction():
                    connection.execute(
                        "SELECT FROM system_error_groups WHERE fingerprint = ANY(%s) ORDER BY fingerprint FOR UPDATE",
                        [chosen],
                    )
                    connection.execute(_RESOLVE, {"groups": chosen})
                retention.run(connection)
                self.result.acts += 1

    def _deliver_the_rest(self, target: HookContext) -> None:
        os.environ["CHECKPOINTER_SPOOL_DIR"] = str(self._folder / "spool")
        last = Observability(target)
        try:
            last.errors.collect_leftovers()
            with target.connect_redis() as client:
                wait_until(
                    lambda: not streamed(client, target.prefix) and not last.spool.read(list(last._outbox._tables), 1),
                    timeout=_PATIENCE,
                )
        finally:
            last.close(60)

    def _audit(self, target: HookContext) -> None:
        result = self.result
        with target.connect_postgres() as connection:
            for fingerprint, kind, severity, hour, count in connection.execute(
                "SELECT fingerprint, error_type, severity, "
                "to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24'), sum(occurrences) "
                "FROM system_errors GROUP BY 1, 2, 3, 4"
            ):
                result.stored[fingerprint, kind, severity, hour] = int(count)
            for delivery, count in connection.execute("SELECT delivery, count(*) FROM system_errors GROUP BY 1"):
                result.deliveries[delivery] = count
            for table in ("system_errors", "system_error_groups", "system_error_hourly", "system_error_audit"):
                [(result.counts[table],)] = connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchall()
            [(result.counts["resolved by themselves"], result.counts["regressions"])] = connection.execute(
                "SELECT (SELECT count(*) FROM system_errors WHERE resolved_by = 'system'), "
                "(SELECT sum(regressions)::int FROM system_error_groups)"
            ).fetchall()
            for claim, statement in AUDIT.items():
                found = connection.execute(statement.encode()).fetchall()
                if found:
                    result.failures.append(f"{claim} ({len(found)} times): {found[:3]}")
        for key in result.reported.keys() | result.stored.keys():
            if result.reported[key] != result.stored[key]:
                result.failures.append(f"{key}: {result.reported[key]} reported, {result.stored[key]} stored")
        if result.ways["stderr"]:
            result.failures.append(f"{result.ways['stderr']} errors only got to standard error")
        # From the log, since a crash takes the server's own counter with it.
        result.deadlocks = self._servers.postgres.log.read_text(errors="replace").count("deadlock detected")
        if result.deadlocks:
            result.failures.append(f"Postgres met {result.deadlocks} deadlocks")


def fire(processes: int, events: int, restarts: int, seed: int) -> Result:
    """Run one; the result says what was wrong."""
    result = Result(seed, processes, events, restarts)
    with tempfile.TemporaryDirectory(prefix="fire-") as folder:
        Fire(result, Path(folder)).run()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--events", type=int, default=50_000, help="of each process")
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    outcome = fire(arguments.processes, arguments.events, arguments.restarts, arguments.seed)
    print(outcome)
    sys.exit(not outcome.is_good)
