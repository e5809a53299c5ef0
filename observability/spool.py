"""A local SQLite file for rows that neither Postgres nor Redis takes at the moment.

Several processes may use one file at once. The file is opened for each operation: so it survives a fork and
a kill at any instant, and costs nothing while it is not needed. Not here: when to use it (`outbox.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

logger = logging.getLogger("checkpointer.observability")

_MAX_BYTES = 64 * 1024 * 1024
_PAGE_BYTES = 4_096
_BUSY_SECONDS = 5.0

_TABLE = (
    "CREATE TABLE IF NOT EXISTS spool (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, row TEXT NOT NULL)"
)


def backlog() -> dict[Path, int | None]:
    """Return how many rows wait in each file of this user, whatever its target; None for one that cannot be read."""
    return {path: _count(path, _BUSY_SECONDS) for path in sorted(_folder().glob("*.sqlite3"))}


def _count(path: Path, timeout: float) -> int | None:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=timeout)) as database:
            [(found,)] = database.execute("SELECT count(*) FROM spool").fetchall()
            return int(found)
    except sqlite3.Error:
        # An empty file is one in which nothing was stored yet.
        return None if path.stat().st_size else 0


def _folder() -> Path:
    if configured := os.environ.get("CHECKPOINTER_SPOOL_DIR"):
        return Path(configured)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "langgraph-checkpoint-buffered"


class Spool:
    """Rows as text, in the order in which they came.

    Args:
        identity: Names the file: rows of one target never reach another.
        max_bytes: The file grows no further; rows are then refused with `sqlite3.Error`.
    """

    def __init__(self, identity: str, *, max_bytes: int = _MAX_BYTES) -> None:
        self._name = re.sub(r"[^A-Za-z0-9_.-]", "_", identity)[:200] + ".sqlite3"
        self._max_pages = max_bytes // _PAGE_BYTES

    @property
    def path(self) -> Path:
        """Where the file is or would be."""
        return _folder() / self._name

    def count(self) -> int | None:
        """Return how many rows wait in the file; None if it cannot be read at the moment. Does not wait for others."""
        try:
            return _count(self.path.absolute(), 0.0) if self.path.exists() else 0
        except OSError:
            return None

    def append(self, kind: str, rows: Sequence[str]) -> None:
        """Store rows.

        Raises:
            OSError: The folder cannot be made.
            sqlite3.Error: The file cannot be written, or is full.
        """
        with closing(self._open()) as database, database:
            database.executemany("INSERT INTO spool (kind, row) VALUES (?, ?)", [(kind, row) for row in rows])

    def read(self, kinds: Sequence[str], count: int) -> list[tuple[int, str, str]]:
        """Return the oldest rows of some kinds as (number, kind, row); nothing if there is no file."""
        if not self.path.exists():
            return []
        marks = ", ".join("?" for _ in kinds)
        with closing(self._open()) as database:
            return database.execute(
                f"SELECT id, kind, row FROM spool WHERE kind IN ({marks}) ORDER BY id LIMIT ?",
                (*kinds, count),
            ).fetchall()

    def delete(self, numbers: Iterable[int]) -> None:
        """Forget rows; those that another process has already deleted do not matter."""
        with closing(self._open()) as database, database:
            database.executemany("DELETE FROM spool WHERE id = ?", [(number,) for number in numbers])

    def _open(self) -> sqlite3.Connection:
        path = self.path
        if not path.exists():
            _create(path)
        try:
            return self._connect(path)
        except sqlite3.DatabaseError as exc:
            if exc.sqlite_errorcode not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise
            aside = path.with_suffix(".damaged")
            logger.error("the spool file is damaged; it is kept as %s", aside)
            path.replace(aside)
            _create(path)
            return self._connect(path)

    def _connect(self, path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, timeout=_BUSY_SECONDS)
        try:
            # A killed process loses nothing by this, only a power failure may. Waiting for the disk would take
            # some 20 ms for each row: in a burst far more would be lost in the queue than is saved here.
            database.execute("PRAGMA synchronous = OFF")
            database.execute(f"PRAGMA max_page_count = {self._max_pages}")
            # A file that a power failure has left empty.
            database.execute(_TABLE)
        except BaseException:
            database.close()
            raise
        return database


def _create(path: Path) -> None:
    """Make the file, without rows, with mode 0600, which SQLite gives to the files beside it as well."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Under another name first. Closing a descriptor of the file itself would release the locks that SQLite holds on
    # it for other threads of this process; and whoever changes the journal mode while another one looks into the file
    # does not wait but fails, so that a row would be lost.
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with closing(sqlite3.connect(draft)) as database:
            database.execute("PRAGMA synchronous = OFF")
            # Has to come before the first table; deleted rows then give their room back.
            database.execute("PRAGMA auto_vacuum = FULL")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(_TABLE)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
