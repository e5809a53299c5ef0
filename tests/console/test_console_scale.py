"""With 100,000 errors and a thread of 10,000 checkpoints each page reads and shows about what it would with few."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from helpers import await_until, with_database
from psycopg import sql
from visits import ADMIN, visiting

from checkpointer import timelines, whereabouts
from checkpointer.flush import dead_letters
from checkpointer.store import schema
from observability.api import create_app
from observability.errors import reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    Connection = psycopg.Connection[Any]

ERRORS, GROUPS, CHECKPOINTS, THREADS = 100_000, 300, 10_000, 3_000
BYTES = 150_000
"""The longest page."""

# The tables that grow with use; each page may read so many rows of each.
LARGE = (
    "system_errors",
    "system_error_hourly",
    "system_error_audit",
    "thread_logs",
    "checkpoints",
    "checkpoint_blobs",
    "checkpoint_writes",
    "checkpoint_dead_letters",
)
ROWS = 2_500

_FILL = f"""
INSERT INTO system_errors (error_type, severity, thread_id, error_message, stack_trace, created_at, recorded_at,
    resolved_at, event_id, fingerprint, component, operation)
SELECT 'type_' || n % 12, CASE WHEN n % 1000 = 7 THEN 'critical' WHEN n % 10 = 7 THEN 'error' ELSE 'warning' END,
    CASE WHEN n % 500 = 0 THEN 'long' ELSE 'thread-' || lpad((n % {THREADS})::text, 5, '0') END,
    'The flush failed at attempt ' || n, repeat('  File "flusher.py", line 1, in flush' || chr(10), 20), at, at,
    CASE WHEN n % 3 = 0 THEN at END, gen_random_uuid(), 'v1:' || n % {GROUPS}, 'flusher', 'flush'
FROM generate_series(1, {ERRORS}) AS n, LATERAL (SELECT now() - n * interval '20 seconds' AS at) AS happened;
INSERT INTO system_error_groups (fingerprint, error_type, severity, title, first_seen_at, last_seen_at, occurrences)
SELECT fingerprint, min(error_type), min(severity), min(error_message), min(created_at), max(created_at), count(*)
FROM system_errors GROUP BY fingerprint;
INSERT INTO system_error_hourly (fingerprint, hour, error_type, severity, occurrences)
SELECT fingerprint, date_trunc('hour', created_at, 'UTC'), error_type, severity, count(*)
FROM system_errors GROUP BY 1, 2, 3, 4 ON CONFLICT DO NOTHING;
INSERT INTO system_error_audit (at, action, actor, error_id)
SELECT now() - n * interval '1 minute', 'resolve', 'ann', n FROM generate_series(1, 50000) AS n;
INSERT INTO thread_logs (thread_id, level, message, created_at)
SELECT CASE WHEN n % 5 = 0 THEN 'long' ELSE 'thread-' || n % {THREADS} END, 'info', 'Line ' || n,
    now() - (50000 - n) * interval '2 seconds'
FROM generate_series(1, 50000) AS n;
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
SELECT 'long', '', '1f000000-0000-6000-8000-' || lpad(n::text, 12, '0'),
    '1f000000-0000-6000-8000-' || lpad((n - 1)::text, 12, '0'),
    jsonb_build_object('v', 4, 'id', '1f000000-0000-6000-8000-' || lpad(n::text, 12, '0'),
        'ts', now() - ({CHECKPOINTS} - n) * interval '10 seconds', 'channel_values', '{{}}'::jsonb,
        'versions_seen', '{{}}'::jsonb, 'channel_versions', jsonb_build_object('messages', n::text, 'fixed', '1')),
    jsonb_build_object('source', 'loop', 'step', n)
FROM generate_series(1, {CHECKPOINTS}) AS n;
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
SELECT 'long', '', 'messages', n::text, 'json', convert_to(to_jsonb(repeat('a' || n, 300))::text, 'UTF8')
FROM generate_series(1, {CHECKPOINTS}) AS n;
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
VALUES ('long', '', 'fixed', '1', 'json', '"f"');
INSERT INTO checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob)
SELECT 'long', '', '1f000000-0000-6000-8000-' || lpad(n::text, 12, '0'), 'task', i, 'messages', 'json', '"w"'
FROM generate_series(1, {CHECKPOINTS}) AS n, generate_series(0, 1) AS i;
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, checkpoint, metadata)
SELECT 'thread-' || lpad(n::text, 5, '0'), '', '1f000000-0000-6000-8000-' || lpad(i::text, 12, '0'),
    '{{"channel_versions": {{}}}}', '{{"step": 1}}'
FROM generate_series(1, {THREADS}) AS n, generate_series(0, 3) AS i;
INSERT INTO checkpoint_dead_letters (prefix, thread_id, checkpoint_ns, kind, field, sequence, payload, error_type,
    error_message, event_id, resolved_at, resolution)
SELECT 'scale', 'thread-' || lpad(n::text, 5, '0'), '', 'blob', '\\x620000786100', n, '\\x00', 'X', 'No.',
    gen_random_uuid(), CASE WHEN n % 40 > 0 THEN now() END, CASE WHEN n % 40 > 0 THEN 'dropped' END
FROM generate_series(1, {THREADS}) AS n;
"""

PAGES = [
    # An hour has at most a row for each group.
    ("/", {"system_error_hourly": 24 * GROUPS}),
    ("/errors", {}),
    ("/errors?state=all", {}),
    ("/errors?severity=critical", {}),
    ("/errors?thread_id=long&state=all", {}),
    ("/errors?fingerprint=v1:7", {}),
    ("/errors/500", {}),
    ("/groups", {}),
    ("/groups/v1:7", {}),
    # Up to 10,000 checkpoints of a thread are counted, by an index alone.
    ("/threads", {"checkpoints": 15_000}),
    ("/threads?q=thread-02", {"checkpoints": 15_000}),
    ("/thread?thread=long", {"checkpoints": 12_000}),
    ("/thread/compare?thread=long&first={first}&second={last}", {}),
    ("/dead-letters", {}),
    ("/dead-letters?all=yes", {}),
    ("/dead-letters/500", {}),
    ("/audit", {}),
    ("/audit?error_id=500", {}),
]


@pytest.fixture(scope="module")
def full(servers: Any) -> Iterator[str]:
    """The connection string of a database of this file's own, with all that in it."""
    name = f"test_{uuid4().hex}"
    database = sql.Identifier(name)
    with psycopg.connect(servers.postgres_uri, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(database))
        try:
            uri = with_database(servers.postgres_uri, name)
            with psycopg.connect(uri, autocommit=True) as connection:
                schema.setup(connection)
                connection.execute("INSERT INTO checkpoint_buffers (prefix, partitions) VALUES ('scale', 32)")
                with psycopg.ClientCursor(connection) as cursor:
                    cursor.execute(re.sub(r"%(?!\(|%)", "%%", _FILL).encode(), {"prefix": "scale"})
                connection.execute("VACUUM ANALYZE")
            yield uri
        finally:
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(database))


def _read(conn: Connection) -> dict[str, tuple[int, int]]:
    """Return for each large table how often it was read from end to end, and how many rows of it by anything."""
    rows = conn.execute(
        "SELECT t.relname, t.seq_scan, t.seq_tup_read + (SELECT coalesce(sum(i.idx_tup_read), 0) "
        "FROM pg_stat_user_indexes AS i WHERE i.relid = t.relid) FROM pg_stat_user_tables AS t"
    ).fetchall()
    return {name: (scans, int(read)) for name, scans, read in rows if name in LARGE}


async def _alone(conn: Connection) -> bool:
    """Tell whether all other sessions have ended, and with that told the statistics what they have read."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    row = conn.execute(others).fetchone()
    return row == (0,)


@pytest.mark.parametrize(("path", "more"), PAGES, ids=[path for path, _ in PAGES])
async def test_a_page_reads_little_and_is_short(full: str, redis_url: str, path: str, more: dict[str, int]) -> None:
    first, last = (f"1f000000-0000-6000-8000-{number:012}" for number in (1, CHECKPOINTS))
    url = "/console" + path.format(first=first, last=last)
    app = create_app(postgres_uri=full, redis_url=redis_url, admin_token=ADMIN, prefix="scale")
    with psycopg.connect(full, autocommit=True) as conn:
        async with visiting(app, ADMIN) as admin:
            await admin.get("/console/errors/1")  # connects
            answer = await admin.get(url)
        assert answer.status_code == 200
        assert len(answer.content) < BYTES
        await await_until(lambda: _alone(conn))
        before = _read(conn)
        async with visiting(app) as again:
            again.client.cookies = admin.client.cookies
            assert (await again.get(url)).content[:15] == b"<!doctype html>"
        await await_until(lambda: _alone(conn))
        after = _read(conn)
    for table in LARGE:
        scans, rows = (after[table][i] - before[table][i] for i in (0, 1))
        assert scans == 0, table
        assert rows <= more.get(table, ROWS), (table, rows)


async def test_the_last_page_of_a_list_costs_what_the_first_does(full: str, redis_url: str) -> None:
    app = create_app(postgres_uri=full, redis_url=redis_url, admin_token=ADMIN, prefix="scale")
    async with visiting(app, ADMIN) as admin:
        html = (await admin.get("/console/thread?thread=long&before=1f000000-0000-6000-8000-000000000051")).text
        steps = re.findall(r"<strong>step (\d+)</strong>", html)
        assert steps == [str(step) for step in range(50, 0, -1)]
        assert len(html) < BYTES
        assert 'rel="next"' not in html


def plan_of(conn: Connection, statement: str, params: Any) -> tuple[set[str], set[str], float]:
    """Return the indexes of a statement, the large tables that it reads whole, and the rows of its busiest node."""
    text = f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}"
    ((explained,),) = conn.execute(text.encode(), params).fetchall()
    indexes: set[str] = set()
    whole: set[str] = set()
    busiest = 0.0
    nodes = [json.loads(explained)[0]["Plan"] if isinstance(explained, str) else explained[0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if "Index Name" in node:
            indexes.add(node["Index Name"])
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] in LARGE:
            whole.add(node["Relation Name"])
        busiest = max(busiest, (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
    return indexes, whole, busiest


@pytest.mark.parametrize(
    ("name", "index", "rows"),
    [
        ("timeline", "checkpoints_pkey", 600),
        ("threads", "checkpoints_", 2_500),
        ("errors", "idx_system_errors_", 200),
        ("errors of a thread", "idx_system_errors_", 300),
        ("log", "thread_logs_", 500),
        ("old log", "thread_logs_", 11_000),
        ("dead letters", "checkpoint_dead_letters", 300),
        ("audit", "system_error_audit", 100),
    ],
)
def test_lists_go_by_an_index(full: str, name: str, index: str, rows: int) -> None:
    cutoff = "1f000000-0000-6000-8000-000000005000"
    page = {"thread": "long", "ns": "", "before": cutoff, "limit": 51, "buffered": [cutoff]}
    names = {"prefix": "scale", "after": "thread-01000", "limit": 2_001, "buffered": []}
    errors = reading.find(limit=50)
    of_thread = reading.find(reading.Filters(state="all", thread_id="long"), limit=50)
    log = reading.log_between("long", None, None, limit=50)
    now = datetime.now(UTC)
    old = reading.log_between("long", now - timedelta(hours=20), now - timedelta(hours=19), limit=50)
    letters = dead_letters.listing("scale", None, 51, False, None)
    audit = reading.audit(limit=50)
    after = "WHERE thread_id > %(after)s"
    statements: dict[str, tuple[str, Any]] = {
        "timeline": (timelines.PAGE.format(before=timelines.BEFORE), page),
        "threads": (whereabouts._NAMES.format(after=after, and_open="AND prefix = %(prefix)s AND token > 0"), names),
        "errors": (errors.sql, errors.params),
        "errors of a thread": (of_thread.sql, of_thread.params),
        "log": (log.sql, log.params),
        "old log": (old.sql, old.params),
        "dead letters": (letters.sql, letters.params),
        "audit": (audit.sql, audit.params),
    }
    with psycopg.connect(full, autocommit=True) as conn:
        indexes, whole, busiest = plan_of(conn, *statements[name])
    assert not whole
    assert any(index in used for used in indexes), indexes
    assert busiest <= rows
