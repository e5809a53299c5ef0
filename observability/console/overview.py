"""The page that answers first: is everything saved? It asks again by itself every few seconds.

Each server is asked by itself and may be away: what is not known is said, and the rest is shown. Not here: what is
asked (`checkpointer/inspection.py`, `errors/reading.py`, `backlog.py`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

import contextlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import anyio
from fastapi import APIRouter, Request
from starlette.responses import Response

from checkpointer.errors import CheckpointerError
from observability import backlog
from observability.console.charts import Chart, stacked
from observability.console.pages import Pages, duration
from observability.errors import reading

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from checkpointer.inspection import Inspector, RedisStanding, StoreStanding

_PATIENCE = 4.0
_SLOW_SECONDS = 60.0
_HOURS = 24

Level = Literal["good", "warning", "bad"]


@dataclass(slots=True)
class Standing:
    """What was found; None stands for what is not known.

    Attributes:
        has_buffer: Whether there is anybody to ask about the buffer.
        postgres: How it stands in Postgres.
        redis: How it stands in Redis.
        groups: Groups of errors that are open, by severity.
        chart: Errors by hour.
        spooled: Reports that wait in files of this user on this machine.
        streamed: Reports that wait in Redis.
        store_trouble: Why the errors could not be asked for.
    """

    has_buffer: bool
    postgres: "StoreStanding | None" = None
    redis: "RedisStanding | None" = None
    groups: dict[str, int] | None = None
    chart: Chart | None = None
    spooled: int | None = None
    streamed: int | None = None
    store_trouble: str | None = None
    verdict: "Verdict" = field(default_factory=lambda: Verdict("warning", "Nothing is known yet", ""))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer: how good it is, in a few words, and in a sentence."""

    level: Level
    title: str
    text: str


def add_pages(router: APIRouter, pages: Pages) -> None:
    """Add the page to the console."""

    async def show(request: Request, name: str) -> Response:
        visitor = await pages.visitor(request)
        standing = await _look(pages)
        return pages.render(request, name, visitor=visitor, standing=standing)

    @router.get("/")
    async def overview(request: Request) -> Response:
        return await show(request, "overview")

    @router.get("/standing")
    async def standing(request: Request) -> Response:
        return await show(request, "standing")


async def _look(pages: Pages) -> Standing:
    found = Standing(pages.inspector is not None)
    now = datetime.now(UTC)

    async def errors() -> None:
        try:
            found.groups = await pages.store.run(reading.open_groups())
            span = reading.trends(since=now - timedelta(hours=_HOURS - 1), until=now, by="severity")
            found.chart = stacked(await pages.store.run(span))
        except CheckpointerError as exc:
            found.store_trouble = str(exc)

    async def spooled() -> None:
        counts = await pages.ask(backlog.spooled)
        found.spooled = sum(count or 0 for count in counts.values())

    questions: list[Callable[[], Coroutine[Any, Any, None]]] = [errors, spooled]
    if (inspector := pages.inspector) is not None:

        async def postgres() -> None:
            found.postgres = await pages.ask(inspector.in_postgres)

        async def redis() -> None:
            found.redis = await pages.ask(inspector.in_redis)

        async def streamed() -> None:
            found.streamed = await pages.ask(lambda: _streamed(inspector))

        questions += [postgres, redis, streamed]
    # Whoever does not answer in time is not waited for: the page asks again.
    with anyio.move_on_after(_PATIENCE):
        async with anyio.create_task_group() as tasks:
            for question in questions:
                tasks.start_soon(question)
    found.verdict = judge(found)
    return found


def _streamed(inspector: "Inspector") -> int | None:
    # Whatever Redis says: that it is away stands elsewhere on the page.
    with contextlib.suppress(Exception), contextlib.closing(inspector.connect_redis()) as client:
        return backlog.streamed(client, inspector.key_prefix)
    return None


def judge(standing: Standing) -> Verdict:
    """Answer whether everything is saved."""
    if not standing.has_buffer:
        return _of_errors(standing, "The errors of the application", "This console has no connection to the buffer.")
    store, redis = standing.postgres, standing.redis
    redis_away = redis is None or redis.trouble is not None
    waiting = None if redis is None else redis.backlog
    count = "What is put waits" if waiting is None else f"{plural(waiting.records, 'record')} wait"
    if store is None or store.trouble is not None:
        if redis_away:
            return Verdict("bad", "Nothing can be saved now", "Neither Postgres nor Redis answers.")
        text = f"Postgres does not answer. {count} in Redis until it is back."
        return Verdict("bad", "Saved in Redis, not in Postgres", text)
    if redis_away:
        text = "Redis does not answer. Checkpoints go straight to Postgres; what Redis had is flushed when it is back."
        return Verdict("bad", "Saved in Postgres alone", text)
    if not store.is_known:
        text = "No application with this prefix has been set up in this database."
        return Verdict("warning", "Nothing to save yet", text)
    if store.dead_letters:
        title = plural(store.dead_letters, "dead letter")
        text = "Postgres refused a record, and its thread is flushed no further until somebody decides."
        return Verdict("bad", title, text)
    if waiting is not None and waiting.oldest_seconds > _SLOW_SECONDS:
        text = f"{count} in Redis, the oldest for {duration(waiting.oldest_seconds)}. Does anybody flush?"
        return Verdict("warning", "Saved in Redis, and late for Postgres", text)
    if waiting is None or not waiting.records:
        text = "All checkpoints are in Postgres."
    else:
        text = f"{count} to be flushed, the oldest for {duration(waiting.oldest_seconds)}."
    return _of_errors(standing, "Everything is saved", text)


def _of_errors(standing: Standing, title: str, text: str) -> Verdict:
    critical = (standing.groups or {}).get("critical", 0)
    if not critical:
        return Verdict("good", title, text)
    verb = "is" if critical == 1 else "are"
    return Verdict("warning", f"{title}, and {plural(critical, 'critical error')} {verb} open", text)


def plural(count: int, noun: str) -> str:
    """Return a count with what is counted."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
