"""The overview answers whether everything is saved, whichever server is away."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import scene
from fastapi import FastAPI
from helpers import await_until
from savers import NOTHING, Recording, put_chain
from visits import ADMIN, text_of

from checkpointer.flush.backlog import Backlog
from checkpointer.inspection import RedisStanding, StoreStanding
from observability.api import BearerTokens, Store, create_app
from observability.console import create_console_router
from observability.console.charts import HEIGHT, WIDTH, stacked
from observability.console.overview import Standing, judge
from observability.errors.reading import Series, Trends

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    from visits import Visit

    from checkpointer.embedded import Servers

    Connection = psycopg.Connection[Any]


async def test_it_shows_what_waits_until_it_is_flushed(admin: Visit, make: Callable[..., Recording]) -> None:
    saver = make()
    assert "Everything is saved" in text_of((await admin.get("/console/")).text)
    put_chain(saver, "t", range(3))

    async def shown() -> str:
        return text_of((await admin.get("/console/standing")).text)

    async def says(words: str) -> bool:
        return words in await shown()

    await await_until(lambda: says("6 records wait to be flushed"))
    assert "6 records of 1 thread" in await shown()
    await asyncio.to_thread(saver.flush)
    await await_until(lambda: says("All checkpoints are in Postgres"))


async def test_errors_of_the_day_stand_in_a_chart_and_in_a_table(admin: Visit, conn: Connection) -> None:
    assert "No error in the last 24 hours" in (await admin.get("/console/")).text
    scene.plant_errors(conn)
    html = (await admin.get("/console/")).text
    counts = "SELECT sum(occurrences), count(DISTINCT (hour, severity)) FROM system_error_hourly"
    row = conn.execute(counts).fetchone()
    assert row is not None
    assert f"{row[0]} in the last 24 hours" in html
    assert html.count("<rect") == row[1]
    assert 'role="img"' in html
    assert "style=" not in html
    assert "<td" in html
    assert "5 open groups" in text_of(html)


def test_bars_stand_on_each_other_and_none_is_too_low_to_be_seen() -> None:
    starts = [datetime(2026, 3, 14, hour, tzinfo=UTC) for hour in range(3)]
    series = [Series("error", [0, 1_000, 1], 1_001), Series("critical", [0, 1, 0], 1), Series("<odd>", [0, 0, 2], 2)]
    chart = stacked(Trends("hour", starts, series))
    assert chart.kinds == ["critical", "error", "other"]
    assert (chart.highest, chart.total) == (1_001, 1_004)
    assert [column.total for column in chart.columns] == [0, 1_001, 3]
    assert chart.columns[0].bars == []
    for column in chart.columns:
        for bar in column.bars:
            assert bar.height >= 1.5
            assert 0 <= bar.x < bar.x + bar.width <= WIDTH
            assert 0 <= bar.y <= HEIGHT
    low, high = chart.columns[1].bars
    assert (low.kind, high.kind) == ("critical", "error")
    assert high.y <= low.y


GOOD = StoreStanding(None, True, datetime.now(UTC), 0, 0)
AWAY = StoreStanding("Postgres cannot be reached.")
NO_REDIS = RedisStanding("Redis cannot be reached.", None)


def redis(records: int = 0, age: float = 0.0) -> RedisStanding:
    return RedisStanding(None, Backlog(min(1, records), records, 10 * records, age))


@pytest.mark.parametrize(
    ("store", "buffer", "groups", "level", "words"),
    [
        (GOOD, redis(), {}, "good", "Everything is saved"),
        (GOOD, redis(5, 0.4), {"error": 3}, "good", "5 records wait to be flushed"),
        (GOOD, redis(1, 90), {}, "warning", "late for Postgres"),
        (GOOD, redis(), {"critical": 1}, "warning", "1 critical error is open"),
        (GOOD, NO_REDIS, {}, "bad", "Saved in Postgres alone"),
        (AWAY, redis(7, 3), {}, "bad", "7 records wait in Redis until it is back"),
        (None, redis(7, 3), None, "bad", "Saved in Redis, not in Postgres"),
        (AWAY, RedisStanding(None, None), None, "bad", "What is put waits in Redis"),
        (AWAY, NO_REDIS, None, "bad", "Nothing can be saved now"),
        (None, None, None, "bad", "Nothing can be saved now"),
        (StoreStanding(None, False), RedisStanding(None, None), {}, "warning", "Nothing to save yet"),
        (StoreStanding(None, True, None, 2, 0), redis(), {"critical": 2}, "bad", "2 dead letters"),
    ],
)
def test_the_answer_is_as_bad_as_the_worst_of_it(store: Any, buffer: Any, groups: Any, level: str, words: str) -> None:
    verdict = judge(Standing(True, store, buffer, groups))
    assert verdict.level == level
    assert words in f"{verdict.title}. {verdict.text}"


async def test_with_a_server_away_it_says_so_and_shows_the_rest(own_servers: Servers, visit: Any) -> None:
    addresses = {"postgres_uri": own_servers.postgres_uri, "redis_url": own_servers.redis_url}
    with Recording(*addresses.values(), triggers=NOTHING, hooks=()) as saver:
        saver.setup()
        put_chain(saver, "t", range(2))
        app = create_app(**addresses, admin_token=ADMIN)
        async with visit(app, ADMIN) as admin:

            async def shown() -> str:
                answer = await admin.get("/console/")
                assert answer.status_code == 200
                return text_of(answer.text)

            async def says(words: str) -> bool:
                return words in await shown()

            assert "4 records wait to be flushed" in await shown()
            own_servers.postgres.pause()
            text = await shown()
            assert "Saved in Redis, not in Postgres" in text
            assert "4 records wait in Redis until it is back" in text
            assert "The errors cannot be shown now" in text
            assert (await admin.get("/console/threads")).status_code == 503
            own_servers.postgres.resume()
            await await_until(lambda: says("4 records wait to be flushed"))
            own_servers.valkey.kill()
            await await_until(lambda: says("Saved in Postgres alone"))
            answer = await admin.get("/console/threads")
            assert answer.status_code == 200
            assert "Redis cannot be asked" in answer.text
            own_servers.postgres.kill()
            await await_until(lambda: says("Nothing can be saved now"))
            own_servers.valkey.start()
            own_servers.postgres.start()
            await await_until(lambda: says("4 records wait to be flushed"))


async def test_a_console_without_the_buffer_is_about_errors_alone(api_uri: str, visit: Any) -> None:
    store = Store(api_uri)
    app = FastAPI()
    app.include_router(create_console_router(tokens=BearerTokens(store, admin_token=ADMIN), store=store))
    async with visit(app, ADMIN) as admin:
        html = (await admin.get("/console/")).text
        assert "Threads" not in text_of(html)
        assert "no connection to the buffer" in html
        for path in ("threads", "dead-letters", "thread?thread=t"):
            assert (await admin.get(f"/console/{path}")).status_code == 404
        assert (await admin.get("/console/audit")).status_code == 200
