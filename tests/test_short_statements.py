"""The statement of a hot read is prepared once for each session, and survives what happens to sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import put_one
from psycopg_pool import ConnectionPool

from checkpointer import BufferedPostgresSaver
from checkpointer.store.short import ShortStatements

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

SQL = "SELECT %s = 'x' AS is_x, %s::text AS text, NULL AS nothing, 2::bigint AS number"


@pytest.fixture
def session(postgres_uri: str) -> Iterator[Connection[Any]]:
    with psycopg.connect(postgres_uri, autocommit=True) as found:
        yield found


def prepared(session: Connection[Any]) -> list[str]:
    rows = session.execute("SELECT name FROM pg_prepared_statements WHERE statement LIKE '%is_x%'", prepare=False)
    return [name for (name,) in rows if name.startswith("checkpointer")]


def test_values_of_each_type_come_back_and_one_statement_is_prepared(session: Connection[Any]) -> None:
    short = ShortStatements()
    assert short.suits(session)
    for text in ("x", "é 日本", ""):
        [row] = session.wait(short.ask(session, SQL, (text, text)))
        assert row == {"is_x": text == "x", "text": text, "nothing": None, "number": 2}
    assert len(prepared(session)) == 1


def test_after_deallocate_all_it_is_prepared_anew(session: Connection[Any]) -> None:
    short = ShortStatements()
    session.wait(short.ask(session, SQL, ("x", "y")))
    session.execute("DEALLOCATE ALL")
    assert session.wait(short.ask(session, SQL, ("x", "y")))[0]["is_x"] is True
    assert len(prepared(session)) == 1


def test_after_a_table_was_altered_it_is_prepared_anew(session: Connection[Any]) -> None:
    session.execute("CREATE TABLE altered (value int)")
    session.execute("INSERT INTO altered VALUES (1)")
    short = ShortStatements()
    sql = "SELECT * FROM altered WHERE %s <> ''"
    assert session.wait(short.ask(session, sql, ("x",))) == [{"value": 1}]
    session.execute("ALTER TABLE altered ADD COLUMN more text DEFAULT 'm'")
    assert session.wait(short.ask(session, sql, ("x",))) == [{"value": 1, "more": "m"}]


def test_an_error_of_the_statement_is_raised_and_leaves_the_session_usable(session: Connection[Any]) -> None:
    short = ShortStatements()
    with pytest.raises(psycopg.errors.UndefinedTable):
        session.wait(short.ask(session, "SELECT * FROM missing_table WHERE %s <> ''", ("x",)))
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        session.wait(short.ask(session, "SELECT %s::int AS n", ("x",)))
    assert session.wait(short.ask(session, "SELECT %s::int AS n", ("5",))) == [{"n": 5}]


@pytest.mark.parametrize(
    "settings",
    [{"autocommit": False}, {"autocommit": True, "prepare_threshold": None}, {"client_encoding": "latin1"}],
    ids=["in transactions", "behind a pooler", "another encoding"],
)
def test_a_pool_whose_sessions_do_not_suit_reads_in_the_ordinary_way(
    postgres_uri: str, redis_url: str, prefix: str, settings: dict[str, Any]
) -> None:
    with (
        ConnectionPool(postgres_uri, kwargs={"autocommit": True} | settings, min_size=1, max_size=2) as pool,
        BufferedPostgresSaver(pool, redis_url, prefix=prefix, hooks=(), triggers=frozenset()) as saver,
    ):
        saver.setup()
        saved = put_one(saver, "faß")
        for _ in range(2):
            found = saver.get_tuple({"configurable": {"thread_id": "faß"}})
            assert found is not None
            assert found.config == saved
        with pool.connection() as session:
            names = session.execute("SELECT name FROM pg_prepared_statements").fetchall()
            assert not [name for (name,) in names if name.startswith("checkpointer")]
