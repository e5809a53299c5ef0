"""A look at both servers and at what lies between them: is everything well, and if not, what is to be done?

Not here: what makes a server unfit (`checks.py`) and how the answer is shown (`cli.py`). Nothing is changed, no lock is
waited for, and every question has a time limit: a server that has stopped costs the limit and becomes a finding.

A *probe* is all that one server is asked, in a thread of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from checkpointer import checks, search_path
from checkpointer.buffer.clients import RedisSide, ask_info
from checkpointer.buffer.keys import KeyLayout
from checkpointer.checks import Clocks, Finding, Level
from checkpointer.errors import CheckpointerError, ConfigurationError
from checkpointer.options import BufferOptions
from checkpointer.store import reads, schema
from checkpointer.store.clients import PostgresSide
from checkpointer.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from psycopg import Connection
    from psycopg.rows import DictRow

    from checkpointer.buffer.places import SyncRedis
    from checkpointer.events import CheckpointEvent
    from checkpointer.store.deadline import LimitedConnection

__all__ = ["Report", "diagnose"]

_HELD_SECONDS = 30.0
_LAG_WARNING = 60.0
_LAG_ERROR = 3_600.0
_THREADS_LIMIT = 10_000
_SHOWN = 5

_MIGRATE = "Run `checkpointer migrate` or call setup()."

_BUFFERS = "SELECT prefix, partitions FROM checkpoint_buffers ORDER BY prefix"

_WATER_MARKS = "SELECT prefix, partition, sequence FROM checkpoint_buffer_partitions WHERE sequence > 0"

# The row lock of a partition is its row's xmax, which is the transaction of whoever holds it.
_HELD = """
SELECT p.prefix, p.partition, a.pid, a.application_name, host(a.client_addr) AS client, a.state,
    extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS seconds
FROM checkpoint_buffer_partitions p JOIN pg_stat_activity a ON a.backend_xid = p.xmax
WHERE a.xact_start < clock_timestamp() - make_interval(secs => %s)
ORDER BY a.xact_start, p.prefix, p.partition
"""

_RIGHTS = """
SELECT t.name, r.kind FROM unnest(%s::text[]) AS t (name) CROSS JOIN unnest(%s::text[]) AS r (kind)
WHERE to_regclass(t.name) IS NOT NULL AND NOT has_table_privilege(to_regclass(t.name), r.kind)
ORDER BY t.name, r.kind
"""
_WRITTEN = (
    "checkpoints",
    "checkpoint_blobs",
    "checkpoint_writes",
    "checkpoint_buffers",
    "checkpoint_buffer_partitions",
    "checkpoint_buffer_threads",
    "checkpoint_buffer_tombstones",
)

_EXISTS = "SELECT to_regclass(%s) IS NOT NULL AS it_does"

_DEAD_LETTERS = """
SELECT count(*) AS letters, count(DISTINCT thread_id) AS threads, min(thread_id) AS one
FROM checkpoint_dead_letters WHERE resolved_at IS NULL AND prefix = %s
"""

_CRITICALS = """
SELECT count(*) AS errors, max(created_at) AS latest FROM system_errors
WHERE resolved_at IS NULL AND severity = 'critical'
"""

# One index probe for each thread, and never more than there is room for in a moment.
_THREADS = f"""
WITH RECURSIVE threads AS (
    (SELECT thread_id, 1 AS n FROM checkpoints ORDER BY thread_id LIMIT 1)
    UNION ALL
    SELECT next.thread_id, threads.n + 1
    FROM threads CROSS JOIN LATERAL (
        SELECT thread_id FROM checkpoints WHERE thread_id > threads.thread_id ORDER BY thread_id LIMIT 1
    ) AS next
    WHERE threads.n < {_THREADS_LIMIT}
)
SELECT count(*) AS threads FROM threads
"""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, in the order in which it was asked. True unless there is an error.

    Attributes:
        findings: All findings, also those that say that something is well.
    """

    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """The highest level of a finding."""
        return checks.worst(self.findings)

    def __bool__(self) -> bool:
        return self.level != "error"

    def __add__(self, more: Iterable[Finding]) -> Report:
        return Report((*self.findings, *more))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        names = ("level", "code", "message", "advice")
        found = [{name: getattr(finding, name) for name in names} for finding in self.findings]
        return {"level": self.level, "healthy": bool(self), "findings": found}


def diagnose(
    postgres_uri: str | None,
    redis_url: str | None,
    *,
    options: BufferOptions | None = None,
    timeout: float = 10.0,
    also: Callable[[SyncRedis], Iterable[Finding]] | None = None,
) -> Report:
    """Ask both servers; what goes wrong becomes a finding and is never raised.

    Args:
        postgres_uri: Where Postgres is.
        redis_url: Where Redis is.
        options: The saver's settings: which prefix, schema and partitions to look at.
        timeout: Seconds for each of the two servers.
        also: Asks Redis for more, within the same limit.

    Returns:
        The report; it holds no credentials.
    """
    options = options or BufferOptions()
    clocks = Clocks()
    buffers = {options.prefix: options.partitions}
    marks: dict[tuple[str, int], int] = {}
    asked = _probe("postgres", timeout, lambda probe: _ask_postgres(probe, postgres_uri, options, clocks))
    for row in asked.buffers:
        buffers[row["prefix"]] = row["partitions"]
    for row in asked.marks:
        marks[row["prefix"], row["partition"]] = row["sequence"]
    told = _probe("redis", timeout, lambda probe: _ask_redis(probe, redis_url, options, clocks, buffers, marks, also))
    secrets = _secrets(postgres_uri, redis_url)
    found = [*asked.findings, *told.findings, *checks.clock_findings(clocks)]
    return Report(tuple(_without(secrets, finding) for finding in found))


# -- probes ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Probe:
    """What one server was asked and said so far, and how to wake a thread that waits for it."""

    timeout: float
    findings: list[Finding] = field(default_factory=list)
    buffers: list[DictRow] = field(default_factory=list)
    marks: list[DictRow] = field(default_factory=list)
    cut: Callable[[], None] | None = None

    def add(self, level: Level, code: str, message: str, advice: str = "") -> None:
        self.findings.append(Finding(level, code, " ".join(message.split()), advice))


def _probe(name: str, timeout: float, work: Callable[[_Probe], None]) -> _Probe:
    """Let a thread do the work, and go on without it when its time is over."""
    label = "Postgres" if name == "postgres" else "Redis"
    probe = _Probe(timeout)

    def run() -> None:
        try:
            work(probe)
        except ConfigurationError as exc:
            probe.add("error", f"{name}.configuration", str(exc))
        except Exception as exc:  # noqa: BLE001 - a report is what is wanted, of this too
            probe.add("error", f"{name}.failed", f"{label} could not be examined: {type(exc).__name__}: {exc}")

    thread = threading.Thread(target=run, name=f"checkpointer-doctor-{name}", daemon=True)
    thread.start()
    thread.join(timeout)
    if not thread.is_alive():
        return probe
    # What it still finds goes nowhere.
    late, probe = probe, _Probe(timeout, list(probe.findings), list(probe.buffers), list(probe.marks))
    probe.add(
        "error",
        f"{name}.no_answer",
        f"{label} did not answer within {timeout:g} s; what comes after the last finding about it was not looked at.",
        "It is paused, overloaded, or something between drops packets: look at the server, or give it more time.",
    )
    if late.cut is not None:
        late.cut()
    return probe


def _ignore(_: CheckpointEvent) -> None:
    """Take an event of a tier: the doctor reports by himself."""


# -- Postgres --------------------------------------------------------------------------------------------------------


def _ask_postgres(probe: _Probe, uri: str | None, options: BufferOptions, clocks: Clocks) -> None:
    conn = _connect_postgres(probe, uri, options)
    if conn is None:
        return
    probe.cut = conn.give_up
    with contextlib.closing(conn):
        try:
            _examine_postgres(probe, conn, options, clocks)
        except psycopg.Error as exc:
            probe.add("error", "postgres.lost", f"The connection to Postgres broke off: {_said(exc)}")


def _connect_postgres(probe: _Probe, uri: str | None, options: BufferOptions) -> LimitedConnection[DictRow] | None:
    if not uri:
        probe.add("error", "postgres.address", "There is no address of Postgres.", "Set POSTGRES_URI.")
        return None
    try:
        side = PostgresSide(
            uri,
            apool=None,
            timeout=probe.timeout,
            query_timeout=probe.timeout,
            pool_size=1,
            tier=Tier("postgres", _ignore),
            schema=options.schema,
        )
    except ConfigurationError:
        # Without the parser's words: they quote the string, which can hold a password.
        probe.add(
            "error",
            "postgres.address",
            "The address of Postgres is not a valid connection string.",
            "Use postgresql://user:password@host:port/db, with special characters in the password percent-encoded.",
        )
        return None
    try:
        return side.unchecked()
    except (psycopg.Error, OSError, UnicodeError) as exc:
        text = str(exc)
        if "authentication" in text or "password" in text:
            code, advice = "postgres.login", "Check user and password, and pg_hba.conf on the server."
        elif "does not exist" in text:
            code, advice = "postgres.login", "Check the names of the user and of the database."
        else:
            code, advice = "postgres.unreachable", "Start the server, or check host, port and firewall."
        said = "lets nobody in" if code == "postgres.login" else "cannot be reached"
        probe.add("error", code, f"Postgres {said}: {text}", advice)
        return None


@contextlib.contextmanager
def _asking(probe: _Probe, conn: Connection[DictRow], about: str) -> Iterator[None]:
    """Ask in a transaction that changes nothing and ends in time; a refusal becomes a finding, a lost server is raised.

    The settings are of the transaction, so that a pooler's next client does not get them.
    """
    try:
        with conn.transaction():
            limit = max(100, int(probe.timeout * 1000))
            conn.execute(f"SET LOCAL statement_timeout = {limit}".encode(), prepare=False)
            conn.execute("SET TRANSACTION READ ONLY", prepare=False)
            yield
    except psycopg.Error as exc:
        if conn.broken:
            raise
        probe.add("warning", "postgres.unanswered", f"{about} could not be looked at: {_said(exc)}")


def _rows(conn: Connection[DictRow], query: str, params: Sequence[Any] = ()) -> list[DictRow]:
    return conn.execute(query.encode(), params, prepare=False).fetchall()


def _examine_postgres(probe: _Probe, conn: Connection[DictRow], options: BufferOptions, clocks: Clocks) -> None:
    row: Mapping[str, Any] | None = None
    with _asking(probe, conn, "The server"):
        asked = time.time()
        row = _rows(conn, reads.ready().sql)[0]
        clocks.note("Postgres", row["clock"], asked, time.time())
    if row is None:
        return
    found = checks.postgres_findings(row, schema=options.schema)
    if any(finding.code == "postgres.version" and finding.level == "error" for finding in found):
        probe.findings += found
        return
    if options.schema is not None and row["schema"] is None:
        found = [finding for finding in found if finding.code != "postgres.schema"]
        found.append(
            Finding(
                "error", "postgres.schema", f"There is no schema {options.schema!r}, or no right to use it.", _MIGRATE
            )
        )
    probe.findings += found
    if any(finding.code == "postgres.schema" for finding in found):
        return
    missing = not row["tables"] or (options.schema is not None and row["tables_in"] != [options.schema])
    _ask_migrations(probe, conn, missing=missing)
    if missing:
        return
    with _asking(probe, conn, "The rights of this user"):
        kinds = ["DELETE", "INSERT", "SELECT", "UPDATE"]
        _judge_rights(probe, _rows(conn, _RIGHTS, (list(_WRITTEN), kinds)))
    with _asking(probe, conn, "The partitions"):
        probe.buffers = _rows(conn, _BUFFERS)
        probe.marks = _rows(conn, _WATER_MARKS)
        stored = {row["prefix"]: row["partitions"] for row in probe.buffers}.get(options.prefix)
        probe.findings += checks.partition_findings(options.prefix, options.partitions, stored)
        if stored is None:
            known = ", ".join(repr(row["prefix"]) for row in probe.buffers[:_SHOWN]) or "none"
            probe.add("ok", "postgres.prefix", f"Prefix {options.prefix!r} has not been used here yet (used: {known}).")
    with _asking(probe, conn, "Who holds partitions"):
        _judge_held(probe, _rows(conn, _HELD, (_HELD_SECONDS,)))
    with _asking(probe, conn, "Dead letters"):
        _ask_dead_letters(probe, conn, options.prefix)
    with _asking(probe, conn, "Unresolved errors"):
        _ask_criticals(probe, conn)
    with _asking(probe, conn, "The number of threads"):
        count = _rows(conn, _THREADS)[0]["threads"]
        shown = f"{count} threads are" if count < _THREADS_LIMIT else f"{_THREADS_LIMIT} threads or more are"
        probe.add("ok", "postgres.threads", f"{shown} stored.")


def _ask_migrations(probe: _Probe, conn: Connection[DictRow], *, missing: bool) -> None:
    try:
        with _asking(probe, conn, "Migrations"):
            names = schema.pending(conn)
            if missing:
                probe.add("error", "postgres.tables", "The tables are missing.", _MIGRATE)
            elif names:
                shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
                probe.add("warning", "postgres.migrations", f"{len(names)} migrations are pending: {shown}.", _MIGRATE)
            else:
                probe.add("ok", "postgres.migrations", "No migration is pending.")
    except CheckpointerError as exc:
        probe.add("error", "postgres.migrations", str(exc))


def _judge_rights(probe: _Probe, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    shown = ", ".join(f"{row['kind']} on {row['name']}" for row in rows[:_SHOWN])
    probe.add(
        "error",
        "postgres.rights",
        f"This user lacks rights: {shown}{' ...' if len(rows) > _SHOWN else ''}.",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA ... TO ...",
    )


def _judge_held(probe: _Probe, rows: Sequence[Mapping[str, Any]]) -> None:
    """Tell of transactions that have kept partitions for long: nobody else flushes these."""
    by_pid: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_pid.setdefault(row["pid"], []).append(row)
    for pid, held in by_pid.items():
        first = held[0]
        which = ", ".join(f"{row['prefix']}/{row['partition']}" for row in held[:_SHOWN])
        who = f"{first['application_name'] or 'no application name'}, {first['client'] or 'local'}"
        probe.add(
            "warning",
            "postgres.held",
            f"{len(held)} partitions ({which}{' ...' if len(held) > _SHOWN else ''}) have been held for "
            f"{first['seconds']:.0f} s by the session {pid} ({who}, {first['state']}); nobody else can flush them.",
            f"If that worker is stuck: SELECT pg_terminate_backend({pid}); nothing is lost by it.",
        )


def _ask_dead_letters(probe: _Probe, conn: Connection[DictRow], prefix: str) -> None:
    if not _rows(conn, _EXISTS, ("checkpoint_dead_letters",))[0]["it_does"]:
        return
    row = _rows(conn, _DEAD_LETTERS, (prefix,))[0]
    if row["letters"]:
        probe.add(
            "error",
            "postgres.dead_letters",
            f"{row['letters']} records of {row['threads']} threads ({row['one']!r} among them) were refused by "
            "Postgres and lie in checkpoint_dead_letters; these threads are not flushed any further.",
            "Look at their reasons, and resolve each: mend it, or give it up.",
        )
    else:
        probe.add("ok", "postgres.dead_letters", "There are no dead letters.")


def _ask_criticals(probe: _Probe, conn: Connection[DictRow]) -> None:
    if not _rows(conn, _EXISTS, ("system_errors",))[0]["it_does"]:
        return
    row = _rows(conn, _CRITICALS)[0]
    if row["errors"]:
        probe.add(
            "warning",
            "postgres.criticals",
            f"{row['errors']} critical errors are unresolved, the latest of {row['latest']:%Y-%m-%d %H:%M} UTC.",
            "See `checkpointer query unresolved_criticals`, and resolve them once they are dealt with.",
        )
    else:
        probe.add("ok", "postgres.criticals", "No critical error is unresolved.")


def _said(exc: psycopg.Error) -> str:
    return exc.diag.message_primary or str(exc) or type(exc).__name__


# -- Redis -----------------------------------------------------------------------------------------------------------


def _ask_redis(
    probe: _Probe,
    url: str | None,
    options: BufferOptions,
    clocks: Clocks,
    buffers: Mapping[str, int],
    marks: Mapping[tuple[str, int], int],
    also: Callable[[SyncRedis], Iterable[Finding]] | None,
) -> None:
    if not url:
        probe.add("error", "redis.address", "There is no address of Redis.", "Set REDIS_URL.")
        return
    try:
        side = RedisSide(url=url, tier=Tier("redis", _ignore), timeout=probe.timeout / 2)
        client = side.dedicated()
    except ConfigurationError:
        probe.add(
            "error",
            "redis.address",
            "The address of Redis is not a valid URL.",
            "Use redis://user:password@host:port, with special characters in the password percent-encoded.",
        )
        return
    except (RedisError, OSError) as exc:  # a cluster is asked for its nodes at once
        probe.add("error", "redis.unreachable", f"Redis cannot be reached: {exc}", "Start it, or check the addresses.")
        return
    with contextlib.closing(client):
        try:
            _examine_redis(probe, client, options, clocks, buffers, marks)
            if also is not None:
                probe.findings += also(client)
        except AuthenticationError as exc:
            probe.add("error", "redis.login", f"Redis lets nobody in: {exc}", "Check user and password.")
        except ResponseError as exc:
            probe.add("error", "redis.refused", f"Redis refuses: {exc}")
        except (RedisError, OSError, UnicodeError) as exc:
            probe.add(
                "error",
                "redis.unreachable",
                f"Redis cannot be reached: {exc}",
                "Start the server, or check host, port, TLS (rediss://) and firewall.",
            )


def _examine_redis(
    probe: _Probe,
    client: SyncRedis,
    options: BufferOptions,
    clocks: Clocks,
    buffers: Mapping[str, int],
    marks: Mapping[tuple[str, int], int],
) -> None:
    asked = time.time()
    facts = ask_info(client)
    answered = time.time()
    if len(facts.nodes) == 1 and "server_time_usec" in facts.nodes[0]:
        clocks.note("Redis", facts.nodes[0]["server_time_usec"] / 1e6, asked, answered)
    facts = checks.BufferFacts(facts.nodes, facts.cluster_client, _config_of(client))
    found = checks.redis_findings(facts)
    probe.findings += found
    levels = {options.ack, options.control_ack}
    probe.findings += checks.acknowledgement_findings(facts, levels, options.replicas)
    if any(
        finding.code in ("redis.version", "redis.loading", "redis.cluster")
        for finding in found
        if finding.level == "error"
    ):
        return
    key = KeyLayout(options.key_prefix, options.partitions).state(0)
    try:
        client.eval("return 1", 1, key)
    except ResponseError as exc:
        probe.add(
            "error",
            "redis.rights",
            f"This user cannot run the saver's scripts: {exc}",
            f"Allow it: ACL SETUSER ... +@all ~{options.key_prefix}:* (scripts, hashes, sorted sets, strings).",
        )
        return
    for prefix, partitions in buffers.items():
        _ask_lag(probe, client, prefix, options.schema, partitions, marks)


def _config_of(client: SyncRedis) -> Mapping[str, str] | None:
    found: dict[str, str] = {}
    for name in ("save", "appendfsync"):
        try:
            reply: Any = client.config_get(name)
        except ResponseError:
            return None
        found |= {_text(key): _text(value) for key, value in reply.items()}
    return found


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _ask_lag(
    probe: _Probe,
    client: SyncRedis,
    prefix: str,
    schema_name: str | None,
    partitions: int,
    marks: Mapping[tuple[str, int], int],
) -> None:
    """Tell how much of a prefix waits for Postgres, and since when; and whether Redis has lost what it had."""
    layout = KeyLayout(search_path.key_prefix(prefix, schema_name), partitions)
    pipe = client.pipeline(transaction=False)
    for number in range(partitions):
        pipe.zcard(layout.threads(number))
        pipe.zrange(layout.threads(number), 0, 0, withscores=True)
        pipe.hget(layout.state(number), "sequence")
    replies = pipe.execute()
    seconds, micros = client.time()
    now = seconds * 1000 + micros / 1000
    waiting = sum(replies[0::3])
    firsts = [first[0] for first in replies[1::3] if first]
    if waiting and firsts:
        thread, since = min(firsts, key=lambda first: first[1])
        age = max(0.0, (now - since) / 1000)
        level: Level = "error" if age > _LAG_ERROR else "warning" if age > _LAG_WARNING else "ok"
        probe.add(
            level,
            "redis.lag",
            f"{waiting} threads of prefix {prefix!r} wait to be flushed, the oldest ({_text(thread)!r}) for "
            f"{age:.0f} s.",
            ""
            if level == "ok"
            else "Nobody flushes it: see whether an application or `checkpointer worker` is running with this prefix, "
            "and look for dead letters, held partitions and checkpoint_flush_error.",
        )
    else:
        probe.add("ok", "redis.lag", f"Everything of prefix {prefix!r} is flushed.")
    behind = [n for n, value in enumerate(replies[2::3]) if int(value or 0) < marks.get((prefix, n), 0)]
    if behind:
        probe.add(
            "warning",
            "redis.rollback",
            f"Redis knows less of prefix {prefix!r} than was flushed from it ({len(behind)} partitions): it was "
            "emptied, replaced, or restarted from an old file. What was not flushed at that time is gone.",
            "The savers notice it too and name what is lost: look for checkpoint_lost in system_errors. If Redis is "
            "gone for good, see `checkpointer buffer abandon`. Turn on appendonly.",
        )


# -- credentials -----------------------------------------------------------------------------------------------------


def _secrets(postgres_uri: str | None, redis_url: str | None) -> list[str]:
    found: set[str] = set()
    with contextlib.suppress(psycopg.Error, UnicodeError):
        settings = conninfo_to_dict(postgres_uri or "")
        found |= {str(settings.get(name) or "") for name in ("password", "sslpassword")}
    for url in (postgres_uri, redis_url):
        with contextlib.suppress(ValueError):
            parts = urlsplit(url or "")
            # Of a password with an @ that is not encoded, libpq takes the rest for the host, and names it.
            found |= {*(parts.password or "").split("@"), *parse_qs(parts.query).get("password", ())}
    found |= {unquote(secret) for secret in found}
    return sorted(filter(None, found), key=len, reverse=True)


def _without(secrets: Sequence[str], finding: Finding) -> Finding:
    message = finding.message
    for secret in secrets:
        message = message.replace(secret, "***")
    return Finding(finding.level, finding.code, message, finding.advice)
