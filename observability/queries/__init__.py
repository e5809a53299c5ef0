"""The shipped questions to `system_errors`: one `.sql` file each, for psql and for Python.

Each file opens with the sentence that it answers. A *parameter* is a quoted literal with its name in a comment right
behind it, as in `'24 hours'/*:window*/`: psql runs it as it stands, and here another value can be given, which is sent
beside the text and never becomes part of it. Not here: the paged list behind an administration page.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from psycopg.rows import dict_row

from checkpointer.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import psycopg

__all__ = ["names", "sql", "question", "params", "run", "arun"]

_PARAM = re.compile(r"'((?:[^']|'')*)'/\*:(\w+)\*/")


def names() -> list[str]:
    """Return the names of the queries, sorted."""
    return sorted(entry.name.removesuffix(".sql") for entry in files(__name__).iterdir() if entry.name.endswith(".sql"))


def sql(name: str) -> str:
    """Return the text of a query.

    Raises:
        ConfigurationError: No such name; the message lists the known ones.
    """
    known = names()
    if name not in known:
        raise ConfigurationError(f"there is no query named {name!r}; known are: {', '.join(known)}")
    return files(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8")


def question(name: str) -> str:
    """Return the sentence that a query answers.

    Raises:
        ConfigurationError: No such name.
    """
    return sql(name).partition("\n")[0].removeprefix("--").strip()


def params(name: str) -> dict[str, str]:
    """Return the parameters of a query, with the values that they have if none are given.

    Raises:
        ConfigurationError: No such name.
    """
    return {found[2]: found[1].replace("''", "'") for found in _PARAM.finditer(sql(name))}


def run(conn: psycopg.Connection[Any], name: str, values: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Run a query and return its rows.

    Args:
        conn: Any connection to the database; its transaction state is left to it.
        name: One of `names()`.
        values: Other values for some of `params(name)`.

    Raises:
        ConfigurationError: No such name, or no such parameter.
    """
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(*_statement(name, values)).fetchall()


async def arun(
    conn: psycopg.AsyncConnection[Any], name: str, values: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """As `run`, for an async connection."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(*_statement(name, values))
        return await cursor.fetchall()


def _statement(name: str, values: Mapping[str, str] | None) -> tuple[bytes, dict[str, str] | None]:
    text = sql(name)
    if not values:
        return text.encode(), None
    known = params(name)
    if unknown := sorted(set(values) - set(known)):
        said = f"known are: {', '.join(known)}" if known else "it has none"
        raise ConfigurationError(f"the query {name!r} has no parameter {', '.join(map(repr, unknown))}; {said}")
    text = _PARAM.sub(lambda found: f"%({found[2]})s", text.replace("%", "%%"))
    return text.encode(), {**known, **values}
