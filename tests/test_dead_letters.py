"""What Postgres refuses for what it holds: it is set aside, it delays no other thread, and nothing of it is hidden."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver
from poisoning import WORD, allow, config, forbid, put_step, put_steps, saved, values
from typer.testing import CliRunner

from checkpointer import (
    FlushIncompleteError,
    UnknownDeadLetterError,
    cli,
)
from checkpointer.buffer.keys import field
from checkpointer.records import Blob, CheckpointRow, pack_blob, pack_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointer import DeadLetter

KINDS = ("checkpoint", "blob", "write")


@pytest.fixture
def saver(make: Callable[..., Any], conn: psycopg.Connection[Any]) -> Any:
    made = make()
    forbid(conn)
    return made


@pytest.fixture
def buffer(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def events(saver: Any, name: str) -> list[Any]:
    assert saver.hooks.flush(5)
    return [event for event in saver.events if event.name == name]


def only(saver: Any) -> DeadLetter:
    (letter,) = saver.dead_letters.list()
    return letter


# -- how a record becomes one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_refused_record_is_set_aside_and_its_thread_waits_behind_it(
    saver: Any, conn: psycopg.Connection[Any], kind: str
) -> None:
    ids = put_steps(saver, "t", 5, {2: kind})
    put = values(saver, "t", ids)
    report = saver.flush("t")
    assert not report
    # Of the thread what came before is saved; a checkpoint comes after its blob, and before the writes to it.
    assert saved(conn, "t") == ids[: 3 if kind == "write" else 2]
    letter = only(saver)
    assert (letter.thread_id, letter.kind, letter.attempts, letter.resolution) == ("t", kind, 1, None)
    assert letter.checkpoint_id == (None if kind == "blob" else ids[2])
    assert (letter.sqlstate, letter.error_message) == ("P0001", "no poison here")
    assert str(letter.id) in report.error.message
    assert report.error.sqlstate == "P0001"
    (event,) = events(saver, "dead_letter.added")
    assert (event.severity, event.error_type, event.user_notice) == ("critical", "checkpoint_dead_letter", True)
    assert (event.thread_id, event.checkpoint_ns, event.checkpoint_id) == ("t", "", letter.checkpoint_id)
    assert event.checkpoint_count == (2 if kind == "write" else 3)
    assert event.run_id == ("run-1" if kind == "checkpoint" else None)
    assert event.step == (2 if kind == "checkpoint" else None)
    assert "File" in event.error.stack
    assert WORD not in repr(saver.events) + repr(report) + repr(letter)
    # Nothing is hidden: every checkpoint reads as it was put, and so do those that come later.
    assert values(saver, "t", ids) == put
    ids.append(put_step(saver, "t", 5, ids[-1]))
    assert saver.get_tuple(config("t")).config["configurable"]["checkpoint_id"] == ids[-1]
    # Nothing is flushed over the gap, however often it is asked for, and it is told once.
    for _ in range(3):
        assert not saver.flush("t")
        assert not saver.flush()
    assert saved(conn, "t") == ids[: 3 if kind == "write" else 2]
    assert len(events(saver, "dead_letter.added")) == 1
    assert only(saver).attempts == 1
    assert events(saver, "flush.failed") == events(saver, "flush.incomplete") == []


def test_what_needs_the_thread_in_postgres_names_the_dead_letter(saver: Any) -> None:
    put_steps(saver, "t", 3, {1: "checkpoint"})
    put_steps(saver, "other", 1)
    for use in (
        lambda: list(saver.list(config("t"))),
        lambda: saver.prune(["t"]),
        lambda: saver.copy_thread("t", "copy"),
        lambda: saver.delete_for_runs(["some"]),
        lambda: list(saver.list(None)),
    ):
        with pytest.raises(FlushIncompleteError, match=r"Dead letter \d+ holds up thread 't'"):
            use()
    assert len(events(saver, "dead_letter.added")) == 1, "found by a read, told all the same"
    assert len(list(saver.list(config("other")))) == 1


def test_one_poison_thread_among_many_costs_a_few_statements_once(
    saver: Any, conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    executed = []

    def counting(method: Any) -> Any:
        def counted(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            executed.append(query)
            return method(self, query, *args, **kwargs)

        return counted

    def cost() -> int:
        before = len(executed)
        saver.flush()
        return len(executed) - before

    for method in ("execute", "copy"):
        monkeypatch.setattr(psycopg.Cursor, method, counting(getattr(psycopg.Cursor, method)))
    threads = [f"t{i}" for i in range(200)]

    def put_all(step: int, poison: str = "") -> None:
        for thread in threads:
            put_step(saver, thread, step, poison=poison if thread == "t77" else "")

    put_all(0)
    usual = cost()
    put_all(1, "checkpoint")
    first = cost()
    # Once more without COPY; a batch holds 100 threads: seven halvings, each with two halves of at most three
    # statements; then the thread's three records; then the letter.
    assert usual < first <= usual + 3 + 2 * 3 * 7 + 2 * 3 + 2
    assert all(len(saved(conn, thread)) == (1 if thread == "t77" else 2) for thread in threads)
    put_all(2)
    assert cost() <= usual, "the pinned thread is not tried again"
    assert all(len(saved(conn, thread)) == (1 if thread == "t77" else 3) for thread in threads)


@pytest.mark.parametrize(
    ("sqlstate", "event"),
    [
        ("21000", "dead_letter.added"),
        ("22023", "dead_letter.added"),
        ("23505", "dead_letter.added"),
        ("44000", "dead_letter.added"),
        ("54000", "dead_letter.added"),
        ("42501", "flush.failed"),  # a right is missing
        ("0A000", "flush.failed"),
        ("53100", "flush.failed"),  # the disk is full
        ("40001", "flush.incomplete"),  # a lost race
    ],
)
def test_only_an_error_about_the_data_makes_a_dead_letter(
    saver: Any, conn: psycopg.Connection[Any], sqlstate: str, event: str
) -> None:
    forbid(conn, sqlstate)
    ids = put_steps(saver, "t", 2, {1: "checkpoint"})
    report = saver.flush("t")
    assert not report
    assert saver.hooks.flush(5)
    assert {e.name for e in saver.events} - {"backend.down"} == {event}
    (letters,) = conn.execute("SELECT count(*) FROM checkpoint_dead_letters").fetchone() or ()
    assert letters == (event == "dead_letter.added")
    if event == "flush.failed":
        (told,) = events(saver, "flush.failed")
        assert told.severity == "critical"
        assert "no poison here" in repr(report.error)
    allow(conn)
    if event == "dead_letter.added":
        saver.dead_letters.replay()
    assert wait_until(lambda: saver.flush("t"))
    assert saved(conn, "t") == ids


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xff\xff\xff\xffnever so long", pack_blob(Blob("xs", "2", "a\0b", b""))],
    ids=["empty", "cut off", "unsendable"],
)
@pytest.mark.parametrize("kind", ["checkpoint", "blob"])
def test_a_record_that_cannot_be_read_is_set_aside_and_does_not_stop_the_others(
    saver: Any, conn: psycopg.Connection[Any], buffer: redis.Redis, kind: str, payload: bytes
) -> None:
    ids = put_steps(saver, "t", 2)
    others = put_steps(saver, "other", 2)
    name = field("c", "", ids[1]) if kind == "checkpoint" else field("b", "", "xs", "2")
    key = saver._core.commands.layout.thread("t").dirty
    assert buffer.hexists(key, name)
    buffer.hset(key, name, payload)
    assert not saver.flush()
    assert saved(conn, "other") == others
    assert saved(conn, "t") == ids[:1]
    letter = only(saver)
    assert (letter.kind, letter.size) == (kind, len(payload))
    assert saver.dead_letters.show(letter.id).content is not None
    (stored,) = conn.execute("SELECT payload FROM checkpoint_dead_letters").fetchone() or ()
    assert stored == payload
    assert not saver._core.redis_tier.is_down
    saver.dead_letters.drop(letter.id)
    assert saver.flush()


@pytest.mark.parametrize(
    "payload", [b"", pack_checkpoint(CheckpointRow("", None, b"{}", b"{no JSON", ()))], ids=["empty", "no JSON"]
)
def test_a_record_that_cannot_be_read_is_set_aside_in_a_thread_that_was_deleted_before(
    saver: Any, conn: psycopg.Connection[Any], buffer: redis.Redis, payload: bytes
) -> None:
    put_steps(saver, "t", 2)
    saver.delete_thread("t")
    ids = put_steps(saver, "t", 3)
    buffer.hset(saver._core.commands.layout.thread("t").dirty, field("c", "", ids[1]), payload)
    assert not saver.flush("t")
    assert saved(conn, "t") == ids[:1]
    saver.dead_letters.drop(only(saver).id)
    assert saver.flush()


def test_the_longest_ids_fit_into_a_dead_letter(saver: Any) -> None:
    thread = "é" * 1200
    put_steps(saver, thread, 1, {0: "checkpoint"})
    assert not saver.flush(thread)
    assert only(saver).thread_id == thread


# -- who else is concerned -------------------------------------------------------------------------------------------


def test_every_worker_leaves_a_pinned_thread_alone(
    saver: Any, make: Callable[..., Any], conn: psycopg.Connection[Any], buffer: redis.Redis
) -> None:
    ids = put_steps(saver, "t", 3, {1: "blob"})
    assert not saver.flush("t")
    allow(conn)  # from now on Postgres would take it, but nobody has decided so
    threads = saver._core.commands.layout.threads(saver._core.commands.layout.partition_of("t"))
    buffer.zadd(threads, {"t": 1})  # Redis has forgotten that the thread is pinned
    other = make()
    assert not other.flush()
    assert saved(conn, "t") == ids[:1]
    assert buffer.zscore(threads, "t") == float("inf")
    (first,), (second,) = events(saver, "dead_letter.added"), events(other, "dead_letter.added")
    assert first.event_id == second.event_id, "so that it is stored once"
    assert (first.user_notice, second.user_notice) == (True, False)


def test_a_pinned_thread_does_not_count_as_old(saver: Any, buffer: redis.Redis) -> None:
    ids = put_steps(saver, "t", 3, {1: "checkpoint"})
    assert not saver.flush("t")
    session = saver._core.flusher._session
    layout = session.commands.layout

    def due() -> Any:
        return buffer.zrangebyscore(layout.threads(layout.partition_of("t")), "-inf", "(inf")

    assert due() == []
    put_step(saver, "t", 3, ids[-1])
    session.pipeline([session.commands.drop("t", 0)])  # as after a copy to this thread
    assert due() == []
    assert session.pinned_threads() == ["t"]
    # It shares its partition with others.
    neighbour = next(name for name in map(str, range(10_000)) if layout.partition_of(name) == layout.partition_of("t"))
    put_step(saver, neighbour, 0)
    assert due() == [neighbour.encode()]


def test_what_a_pinned_thread_owes_starts_no_flush(make: Callable[..., Any], conn: psycopg.Connection[Any]) -> None:
    saver = make(triggers=frozenset({"size"}), flush_size=5)
    forbid(conn)
    ids = put_steps(saver, "t", 1, {0: "checkpoint"})
    assert not saver.flush("t")
    for step in range(1, 5):
        ids.append(put_step(saver, "t", step, ids[-1]))
        assert saver._core.ledger.records == 0
    others = put_steps(saver, "other", 2)
    wait_until(lambda: saved(conn, "other") == others)


def test_close_does_not_wait_for_a_pinned_thread(make: Callable[..., Any], conn: psycopg.Connection[Any]) -> None:
    saver = make(triggers=frozenset({"close"}), close_timeout=600.0)
    forbid(conn)
    put_steps(saver, "t", 2, {1: "checkpoint"})
    others = put_steps(saver, "other", 2)
    closing = threading.Thread(target=saver.close, daemon=True)
    closing.start()
    closing.join(120)
    assert not closing.is_alive()
    assert saved(conn, "other") == others
    assert [e.name for e in saver.events] == ["dead_letter.added"]


def test_a_mark_that_was_left_behind_holds_nothing_up(make: Callable[..., Any], conn: psycopg.Connection[Any]) -> None:
    """A process may die between resolving a letter in Postgres and saying so in Redis."""
    first = make()
    ids = put_steps(first, "t", 2)
    first._core.flusher.submit(lambda session: session.pipeline([session.commands.pin("t")])).result()
    first.close()
    make(triggers=frozenset({"age"}), flush_age=0.05)
    wait_until(lambda: saved(conn, "t") == ids)


# -- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_saves_the_record_and_all_that_waited_behind_it(
    saver: Any, make: Callable[..., Any], conn: psycopg.Connection[Any], postgres_uri: str, kind: str
) -> None:
    ids = put_steps(saver, "t", 5, {2: kind})
    put = values(saver, "t", ids)
    saver.flush("t")
    letter = only(saver)
    forbid(conn, "23514")
    (again,) = saver.dead_letters.replay(letter.id)
    assert (again.resolution, again.attempts, again.sqlstate) == (None, 2, "23514")
    assert saved(conn, "t") == ids[: 3 if kind == "write" else 2]
    assert events(saver, "dead_letter.replayed") == []
    allow(conn)
    operator = make()  # as the command line does: another process
    (done,) = operator.dead_letters.replay(thread_id="t", resolved_by="ada")
    assert (done.id, done.resolution, done.resolved_by, done.size) == (letter.id, "replayed", "ada", 0)
    (event,) = events(operator, "dead_letter.replayed")
    assert (event.severity, event.thread_id, event.user_notice) == ("info", "t", True)
    assert saved(conn, "t") == ids
    assert saver.dead_letters.list() == []
    assert [each.id for each in saver.dead_letters.list(include_resolved=True)] == [letter.id]
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        assert values(stock, "t", ids) == put == values(saver, "t", ids)
    # The saver that had put it goes on as if nothing had been.
    assert saver.flush("t")
    assert saver._core.ledger.records == 0
    ids.append(put_step(saver, "t", 5, ids[-1]))
    assert saver.flush("t")
    assert saved(conn, "t") == ids
    assert saver.dead_letters.replay(letter.id) == [done], "to replay it again changes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_redis_has_lost_is_replayed_from_the_letter(
    saver: Any, conn: psycopg.Connection[Any], buffer: redis.Redis, prefix: str, postgres_uri: str, kind: str
) -> None:
    ids = put_steps(saver, "t", 3, {2: kind})
    put = values(saver, "t", ids)
    saver.flush("t")
    for key in buffer.scan_iter(f"{prefix}:*"):
        buffer.delete(key)
    (again,) = saver.dead_letters.replay()
    assert (again.resolution, again.attempts) == (None, 2)
    allow(conn)
    (done,) = saver.dead_letters.replay()
    assert done.resolution == "replayed"
    if kind == "checkpoint":
        with PostgresSaver.from_conn_string(postgres_uri) as stock:
            assert values(stock, "t", ids)[2][0] == put[2][0]
    table = {"checkpoint": "checkpoints", "blob": "checkpoint_blobs", "write": "checkpoint_writes"}[kind]
    (count,) = conn.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() or ()
    assert count == 3


def test_two_replays_at_once_land_once(saver: Any, make: Callable[..., Any], conn: psycopg.Connection[Any]) -> None:
    ids = put_steps(saver, "t", 4, {1: "checkpoint"})
    saver.flush("t")
    allow(conn)
    operators = [make(postgres_timeout=30.0) for _ in range(2)]
    results: list[Any] = []
    start = threading.Barrier(2)

    def work(operator: Any, name: str) -> None:
        start.wait()
        results.extend(operator.dead_letters.replay(resolved_by=name))

    workers = [threading.Thread(target=work, args=pair) for pair in zip(operators, "ab", strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # The second one finds it resolved, or not at all.
    assert {(each.id, each.resolution) for each in results} == {(results[0].id, "replayed")}
    assert len({each.resolved_by for each in results}) == 1
    assert sum(len(events(operator, "dead_letter.replayed")) for operator in operators) == 1
    assert saved(conn, "t") == ids


def test_several_poison_records_of_a_thread_are_found_one_after_another(
    saver: Any, conn: psycopg.Connection[Any]
) -> None:
    ids = put_steps(saver, "t", 6, {1: "checkpoint", 3: "write", 4: "blob"})
    put = values(saver, "t", ids)
    saver.flush("t")
    found = []
    for expected in (1, 4, 4):
        letter = only(saver)
        found.append(letter.kind)
        assert saved(conn, "t") == ids[:expected]
        conn.execute("ALTER TABLE checkpoints DISABLE TRIGGER refuse")
        if letter.kind != "checkpoint":
            conn.execute(f"ALTER TABLE checkpoint_{letter.kind}s DISABLE TRIGGER refuse".encode())
        (done,) = saver.dead_letters.replay(letter.id)
        assert done.resolution == "replayed"
    assert found == ["checkpoint", "write", "blob"]
    assert saved(conn, "t") == ids
    assert values(saver, "t", ids) == put
    assert len(events(saver, "dead_letter.added")) == len(events(saver, "dead_letter.replayed")) == 3
    assert saver.flush()


# -- drop and delete -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_record_is_given_up_and_the_rest_is_saved(
    saver: Any, conn: psycopg.Connection[Any], postgres_uri: str, kind: str
) -> None:
    ids = put_steps(saver, "t", 5, {2: kind})
    saver.flush("t")
    letter = only(saver)
    done = saver.dead_letters.drop(letter.id, resolved_by="ada")
    assert (done.resolution, done.resolved_by) == ("dropped", "ada")
    assert saved(conn, "t") == [each for each in ids if kind != "checkpoint" or each != ids[2]]
    (event,) = events(saver, "dead_letter.dropped")
    assert (event.severity, event.thread_id, event.checkpoint_id) == ("info", "t", letter.checkpoint_id)
    assert ("hole" in event.message) is (kind == "checkpoint")
    assert saver.flush("t")
    assert saver._core.ledger.records == 0
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        assert values(stock, "t", ids) == values(saver, "t", ids)
    # What was given up can still be looked at, and dropping it again changes nothing.
    shown = saver.dead_letters.show(letter.id)
    assert WORD in repr(shown.content)
    assert saver.dead_letters.drop(letter.id) == done
    assert len(events(saver, "dead_letter.dropped")) == 1


def test_a_dropped_latest_checkpoint_is_no_longer_the_latest(saver: Any) -> None:
    ids = put_steps(saver, "t", 3, {2: "checkpoint"})
    saver.flush("t")
    assert saver.get_tuple(config("t")).config["configurable"]["checkpoint_id"] == ids[2]
    saver.dead_letters.drop(only(saver).id)
    assert saver.get_tuple(config("t")).config["configurable"]["checkpoint_id"] == ids[1]


def test_a_checkpoint_that_was_put_again_is_not_dropped_with_its_old_letter(
    saver: Any, conn: psycopg.Connection[Any]
) -> None:
    (parent,) = put_steps(saver, "t", 1)
    bad = put_step(saver, "t", 1, parent, "checkpoint")
    saver.flush("t")
    letter = only(saver)
    found = saver.get_tuple(config("t", bad))
    saver.put(config("t", parent), found.checkpoint, {"source": "loop", "step": 1}, {})
    saver.dead_letters.drop(letter.id)
    assert saved(conn, "t") == [parent, bad]
    assert saver.flush()


def test_a_pinned_thread_is_deleted_at_once_and_its_id_can_be_used_again(
    saver: Any, conn: psycopg.Connection[Any]
) -> None:
    put_steps(saver, "t", 3, {1: "blob"})
    saver.flush("t")
    letter = only(saver)
    saver.delete_thread("t")
    assert saver.get_tuple(config("t")) is None
    assert saved(conn, "t") == []
    gone = saver.dead_letters.show(letter.id)
    assert (gone.resolution, gone.size, gone.content) == ("deleted", 0, None)
    ids = put_steps(saver, "t", 2)
    assert saver.flush("t")
    assert saved(conn, "t") == ids
    assert saver.flush()


# -- the interface ---------------------------------------------------------------------------------------------------


def test_a_letter_is_shown_as_people_read_it(saver: Any) -> None:
    for kind in KINDS:
        put_steps(saver, kind, 1, {0: kind})
    saver.flush()
    shown = {each.kind: saver.dead_letters.show(each.id) for each in saver.dead_letters.list()}
    assert shown["checkpoint"].content["metadata"]["source"] == WORD
    assert shown["blob"].content["value"] == [WORD, 0]
    assert (shown["blob"].name, shown["write"].name) == ("xs 1", "task 0")
    assert shown["write"].content["channel"] == "xs"
    assert [each.thread_id for each in saver.dead_letters.list("blob")] == ["blob"]
    assert len(saver.dead_letters.list(limit=2)) == 2
    for use in (saver.dead_letters.show, saver.dead_letters.replay, saver.dead_letters.drop):
        with pytest.raises(UnknownDeadLetterError, match="no dead letter 999"):
            use(999)


async def test_asynchronous_callers_have_the_same(saver: Any, conn: psycopg.Connection[Any]) -> None:
    for thread in "ab":
        put_steps(saver, thread, 2, {1: "checkpoint"})
    assert not await saver.aflush()
    b, a = sorted(await saver.dead_letters.alist(), key=lambda each: each.thread_id, reverse=True)
    assert (await saver.dead_letters.ashow(a.id)).content["metadata"]["source"] == WORD
    allow(conn)
    (done,) = await saver.dead_letters.areplay(a.id)
    assert done.resolution == "replayed"
    assert (await saver.dead_letters.adrop(b.id)).resolution == "dropped"
    assert await saver.aflush()
    await saver.aclose()


def test_an_application_does_not_see_the_letters_of_another(saver: Any, make: Callable[..., Any], prefix: str) -> None:
    put_steps(saver, "t", 1, {0: "checkpoint"})
    saver.flush()
    other = make(prefix=f"{prefix}.other")
    assert other.dead_letters.list(include_resolved=True) == []
    with pytest.raises(UnknownDeadLetterError):
        other.dead_letters.drop(only(saver).id)
    put_steps(other, "t", 1)
    assert other.flush()


def test_the_command_line_lists_shows_replays_and_drops(
    saver: Any, conn: psycopg.Connection[Any], postgres_uri: str, redis_url: str, prefix: str
) -> None:
    for thread in "ab":
        put_steps(saver, thread, 2, {1: "checkpoint"})
    saver.flush()
    newest, oldest = saver.dead_letters.list()
    addresses = {"POSTGRES_URI": postgres_uri, "REDIS_URL": redis_url}

    def command(*arguments: str, code: int = 0) -> Any:
        whole = ["dead-letters", *arguments, "--prefix", prefix, "--json"]
        done = CliRunner().invoke(cli._app(), whole, env=addresses)
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    assert [each["id"] for each in command("list")] == [newest.id, oldest.id]
    shown = command("show", str(oldest.id))
    assert shown["content"]["metadata"]["source"] == WORD
    (refused,) = command("replay", str(oldest.id), code=1)
    assert refused["attempts"] == 2
    (dropped,) = command("drop", str(newest.id), "--by", "ada")
    assert (dropped["resolution"], dropped["resolved_by"]) == ("dropped", "ada")
    allow(conn)
    (replayed,) = command("replay", "--all")
    assert (replayed["id"], replayed["resolution"]) == (oldest.id, "replayed")
    assert "@" in replayed["resolved_by"]
    listing = ["dead-letters", "list", "--resolved", "--prefix", prefix]
    table = CliRunner().invoke(cli._app(), listing, env={"POSTGRES_URI": postgres_uri, "COLUMNS": "200"})
    assert table.exit_code == 0, table.output
    assert "no poison" in table.stdout
    unknown = CliRunner().invoke(cli._app(), ["dead-letters", "show", "999", "--prefix", prefix], env=addresses)
    assert isinstance(unknown.exception, UnknownDeadLetterError)
    told = conn.execute("SELECT count(DISTINCT thread_id) FROM thread_logs").fetchone()
    assert told == (2,), "the threads' users are told"
    assert saver.flush()
