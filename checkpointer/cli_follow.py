"""What `logs --follow` and `errors tail` share: rows printed as they arrive, until Ctrl-C or until nobody reads on.

Not here: how rows are found (`observability/following.py`).
"""

# No `from __future__ import annotations`: see `cli.py`.

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from checkpointer import cli_output
from checkpointer.cli_connections import connect, context
from observability.following import Follower, Following, Source
from observability.links import PostgresLink

__all__ = ["follow"]


class _Notes(logging.Handler):
    """Tells people that Postgres is away or back: a live view that stands still must not pass for silence."""

    def emit(self, record: logging.LogRecord) -> None:
        cli_output.note(record.getMessage())


def follow(
    source: Source,
    lines: int,
    *,
    postgres_uri: str | None,
    schema: str | None,
    clean: Callable[[dict[str, Any]], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Print the last rows and then each new one, without end.

    Args:
        source: What is followed.
        lines: With how many of the last rows it begins.
        postgres_uri: Where Postgres is.
        schema: The saver's.
        clean: Makes of a row what is shown.
        show: Prints it.

    Raises:
        StoreUnavailableError: Postgres is away at the start; later it is waited for.
        NotSetUpError: The table is missing.
    """
    following = Following(source, lines)
    with connect(postgres_uri, schema) as conn:
        statement = following.look()
        # Only to find out whether this can work at all: the link below takes a missing table for an outage.
        conn.execute(statement.sql.encode(), statement.params)
    link = PostgresLink(context(postgres_uri or "", "checkpointer", schema))
    logger = logging.getLogger("checkpointer.observability")
    notes, level = _Notes(), logger.level
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.closing(link), Follower(following, link, clean) as rows:
            for row in rows:
                show(row)
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)
