"""The shipped questions to `system_errors`: one `.sql` file each, for psql and for Python.

Each file opens with the sentence that it answers and takes no parameters. Not here: the paged list behind
an administration page.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from psycopg.rows import dict_row

from checkpointer.errors import ConfigurationError

if TYPE_CHECKING:
    import psycopg

__all__ = ["names", "sql", "run", "arun"]


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


def run(conn: psycopg.Connection[Any], name: str) -> list[dict[str, Any]]:
    """Run a query and return its rows.

    Args:
        conn: Any connection to the database; its transaction state is left to it.
        name: One of `names()`.

    Raises:
        ConfigurationError: No such name.
    """
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql(name).encode()).fetchall()


async def arun(conn: psycopg.AsyncConnection[Any], name: str) -> list[dict[str, Any]]:
    """As `run`, for an async connection."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(sql(name).encode())
        return await cursor.fetchall()
