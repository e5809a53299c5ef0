"""The command `checkpointer flush`: brings what is buffered to Postgres now.

Not here: flushing without end (`worker.py`), and how it is done (`flush/`).
"""

# No `from __future__ import annotations`: see `cli.py`.

import threading
from typing import TYPE_CHECKING, Annotated, Any

from checkpointer import cli_output, whereabouts
from checkpointer.cli_connections import Common, open_saver
from checkpointer.flush.report import FlushReport
from checkpointer.options import BufferOptions
from checkpointer.saver import BufferedPostgresSaver

if TYPE_CHECKING:
    import typer

_LOOK_SECONDS = 0.3


def add_commands(app: "typer.Typer", common: Common) -> None:
    """Add the command to the command line."""
    import typer

    thread_argument = typer.Argument(help="Only this thread.", show_default="all threads")

    @app.command()
    def flush(
        thread_id: Annotated[str | None, thread_argument] = None,
        as_json: Annotated[bool, common.json] = False,
        prefix: Annotated[str, common.prefix] = BufferOptions().prefix,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Bring what is buffered to Postgres now; exit with 1 if something has to stay in Redis."""
        with open_saver(postgres_uri, redis_url, prefix, in_schema) as saver:
            if thread_id is not None:
                report = saver.flush(thread_id)
            else:
                report = _flush_all(saver, redis_url or "", quiet=as_json)
        if as_json:
            cli_output.print_json(_fields(report))
        elif report:
            cli_output.print_line(_said(report))
        if not report:
            if as_json:
                raise typer.Exit(1)
            cli_output.fail(_trouble(report))


def _flush_all(saver: BufferedPostgresSaver, redis_url: str, *, quiet: bool) -> FlushReport:
    """Flush everything, and show meanwhile how many of the threads are left in the buffer."""
    options = saver.options
    with whereabouts.Buffer(redis_url, options.key_prefix, options.partitions) as buffer:
        total = buffer.waiting_threads() or 0
        found: list[FlushReport | BaseException] = []

        def work() -> None:
            try:
                found.append(saver.flush())
            except BaseException as exc:  # noqa: BLE001 - raised again where the command waits
                found.append(exc)

        worker = threading.Thread(target=work, name="checkpointer-cli-flush", daemon=True)
        with cli_output.progress("Flushing threads", total, quiet=quiet) as advance:
            worker.start()
            while worker.is_alive():
                worker.join(_LOOK_SECONDS)
                left = buffer.waiting_threads()
                advance(total if left is None else max(0, total - left))
    outcome = found[0]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _fields(report: FlushReport) -> dict[str, Any]:
    error = report.error
    return {
        "flushed": bool(report),
        "threads": report.threads,
        "checkpoints": report.checkpoints,
        "blobs": report.blobs,
        "writes": report.writes,
        "waiting_threads": report.waiting_threads,
        "error": error and {"type": error.type, "message": error.message, "sqlstate": error.sqlstate},
    }


def _said(report: FlushReport) -> str:
    if not report.threads:
        return "Nothing was waiting."
    return (
        f"{report.threads} threads are in Postgres: {report.checkpoints} checkpoints, {report.blobs} channel versions "
        f"and {report.writes} pending writes were written."
    )


def _trouble(report: FlushReport) -> str:
    waiting = report.waiting_threads
    why = report.error.message if report.error is not None else "the time was over."
    # The report names at most a hundred, and none if Redis cannot say which there are.
    count = f"at least {len(waiting)}" if len(waiting) == 100 else str(len(waiting))
    what = f"{count} threads could not be flushed" if waiting else "Nothing could be flushed"
    return (
        f"{what}: {why} What waits is still in Redis; see `checkpointer doctor` and `checkpointer dead-letters list`."
    )
