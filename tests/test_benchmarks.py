"""The benchmark program runs, says what it measured, and judges it by its targets; no timing is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import psycopg
import pytest
import redis
from typer.testing import CliRunner

import benchmarks
import checkpointer
from benchmarks import measure, report, targets, where
from benchmarks.__main__ import app
from benchmarks.contenders import CONTENDERS, LOCK_FREE, LUA, MEMORY, OURS, POOLED, STOCK
from benchmarks.measure import Measure, Measures, Results
from benchmarks.network import network
from benchmarks.plots import PICTURES
from benchmarks.scale import STATE
from benchmarks.servers import Servers, address_of_redis

if TYPE_CHECKING:
    from conftest import Addresses

ROOT = Path(__file__).parents[1]


def test_the_smoke_run_measures_every_load_and_judges_every_target(servers: Addresses, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    arguments = ["--quick", "--postgres-uri", servers.postgres_uri, "--redis-url", servers.redis_url]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--output", str(folder), *arguments],
        cwd=ROOT,
        env=os.environ | {"CHECKPOINTER_SPOOL_DIR": str(tmp_path / "spool")},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    found = json.loads((folder / "results.json").read_text())
    assert {load for section in report.SECTIONS for load in section.loads} == {one["load"] for one in found["measures"]}
    assert [note for note in found["notes"] if "could not" in note] == []
    for one in found["measures"]:
        assert set(one) == {"load", "contender", "at", "unit", "median", "p99", "count"}
        assert one["count"] >= 1
        assert one["p99"] >= one["median"]
    assert {"machine", "python", "packages", "postgres", "redis", "load average before"} <= set(found["facts"])

    left_out = "\n".join(found["notes"])
    present = {key for key, one in CONTENDERS.items() if f"{one.name} is left out" not in left_out}
    assert {one["contender"] for one in found["measures"] if one["load"] == "put"} == present | {LUA}

    assert len(found["targets"]) == len(targets.rows(Measures([])))
    assert [row["name"] for row in found["targets"] if row["ratio"] is None] == []

    table = (folder / "results.md").read_text()
    assert all(row["name"] in table for row in found["targets"])
    assert sorted(path.stem for path in folder.glob("*.svg")) == sorted(PICTURES)
    for path in folder.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


KINDS = ("hot read", "hot read, unverified", "cold read", "read by the stock saver", "read by InMemorySaver")


RUNS = ("graph", "graph with InMemorySaver")


def test_a_profile_names_the_parts_of_each_kind_of_work(servers: Addresses) -> None:
    arguments = ["--rounds", "1", "--postgres-uri", servers.postgres_uri, "--redis-url", servers.redis_url]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.where", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    tables = dict(text.split(" | ", 1) for text in done.stdout.split("\n\n| ")[1:])
    assert set(tables) == {"put", "flush", "read", *KINDS, "graphs", *RUNS}
    whole = {row.split(" | ")[0]: row.split(" | ")[1:] for row in tables["read"].split("\n| ")[2:]}
    assert set(whole) == set(KINDS)
    assert all(float(time) > 0 and float(own.removesuffix(" |")) > 0 for time, own in whole.values())
    assert {row.split(" | ")[0] for row in tables["graphs"].split("\n| ")[2:]} == set(RUNS)
    put, flush = tables["put"], tables["flush"]
    for table, parts in (
        (put, ("checkpointer/puts.py", "checkpointer/buffer/pipes.py", "langgraph.checkpoint.serde", "**all**")),
        (flush, ("checkpointer/flush/session.py", "checkpointer/store/writes.py", "psycopg", "**all**")),
        (tables["hot read"], ("checkpointer/operations.py", "checkpointer/store/short.py", "redis", "**all**")),
        (tables["cold read"], ("checkpointer/operations.py", "checkpointer/store/short.py", "**all**")),
        (tables["graph"], ("langgraph.pregel._loop", "checkpointer/puts.py", "**all**")),
        (tables["graph with InMemorySaver"], ("langgraph.pregel._loop", "langgraph.checkpoint.memory", "**all**")),
        (tables["read by the stock saver"], ("langgraph.checkpoint.postgres", "**all**")),
    ):
        rows = {row.split(" | ")[0].removeprefix("| "): row for row in table.splitlines()}
        for part in parts:
            _, share, microseconds, calls = rows[part].removesuffix(" |").split(" | ")
            assert float(share.removesuffix("%")) > 0
            assert float(microseconds) > 0
            assert float(calls) > 0


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (Path(checkpointer.__file__).parent / "flush" / "flusher.py", "checkpointer/flush/flusher.py"),
        (Path(psycopg.__file__), "psycopg"),
        (Path(json.__file__), "Python: json"),
        (Path("<string>"), "Python: named tuples"),
        (Path("<frozen importlib._bootstrap>"), "Python: importlib"),
        (Path(str(benchmarks.__file__)), "the caller"),
    ],
)
def test_a_source_file_belongs_to_a_part(path: Path, part: str) -> None:
    assert where.part_of(path) == part


def test_table_and_pictures_are_made_anew_from_a_file(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    measures = [Measure("history, put", OURS, at, "ms", at / 100, at / 50, 9) for at in (10, 1_000)]
    report.write(first, {"machine": "some"}, measures, ["somebody is left out"])
    made = CliRunner().invoke(app, ["--report", str(first / "results.json"), "--output", str(again)])
    assert made.exit_code == 0, made.output
    for name in ("results.md", "results.json"):
        assert (first / name).read_text() == (again / name).read_text()
    assert [path.name for path in again.glob("*.svg")] == ["history.svg"]
    assert "| BufferedPostgresSaver | 0.10 / 0.20 | 10.0 / 20.0 |" in (again / "results.md").read_text()


def test_nothing_of_a_place_stays_on_the_servers(postgres_uri: str, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        with Servers(postgres_uri, redis_url).place() as place:
            client.set(f"peer:{place.thread()}", "x")
            client.set(f"{place.prefix}.ours:x", "x")
            with psycopg.connect(place.postgres_uri) as conn:
                assert conn.info.dbname == place.prefix
        assert list(client.scan_iter(f"*{place.prefix}*", count=10_000)) == []
    with psycopg.connect(postgres_uri) as conn:
        names = conn.execute("SELECT datname FROM pg_database").fetchall()
    assert (place.prefix,) not in names


def test_the_network_counts_round_trips_and_delays_them(redis_url: str) -> None:
    with network(address_of_redis(redis_url)) as line, redis.Redis(port=line.ports[0]) as client:
        client.ping()
        (before,) = line.turns()
        for _ in range(5):
            client.ping()
        assert line.turns() == [before + 5]
        line.delay(0.05)
        begin = time.monotonic()
        client.ping()
        assert time.monotonic() - begin >= 0.05


# -- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        (range(1, 101), 0.99, 99),
        (range(1, 101), 1.0, 100),
        (range(1, 1001), 0.99, 990),
        ([5.0, 1.0, 3.0], 0.99, 5.0),
        ([5.0, 1.0, 3.0], 0.5, 3.0),
        ([7.0], 0.99, 7.0),
    ],
)
def test_a_percentile_is_the_value_of_the_nearest_rank(values: Any, share: float, expected: float) -> None:
    assert measure.percentile(list(values), share) == expected


def test_a_warm_up_does_not_count() -> None:
    results = Results()
    with results.warm_up():
        results.note("put", OURS, 100.0)
    results.note("put", OURS, 1.0)
    results.note("put", OURS, 3.0)
    assert results.measures() == [Measure("put", OURS, 0, "ms", 2.0, 3.0, 2)]


def test_one_load_has_one_unit() -> None:
    results = Results()
    results.note("put", OURS, 1.0)
    with pytest.raises(ValueError, match="measured in ms"):
        results.note("put", STOCK, 1.0, unit="s")


def test_measures_survive_json() -> None:
    measures = [Measure("burst", OURS, 50, "checkpoints/s", 1.5, 2.5, 3)]
    assert measure.from_json(json.loads(json.dumps(measure.as_json(measures)))) == measures


@pytest.mark.parametrize(
    ("wanted", "limit", "ratio", "met"),
    [
        ("at most", 1.3, 1.3, True),
        ("at most", 1.3, 1.31, False),
        ("at least", 10.0, 10.0, True),
        ("at least", 10.0, 9.99, False),
        ("at most", 0.0, 0.0, True),
        ("at most", 1.3, None, False),
        ("at least", 10.0, None, False),
    ],
)
def test_a_target_is_met_up_to_its_limit_and_not_without_a_measure(
    wanted: targets.Wanted, limit: float, ratio: float | None, met: bool
) -> None:
    assert targets.judge("name", wanted, limit, "of", "measured", ratio).met is met


def test_nothing_is_divided_by_nothing() -> None:
    assert targets.ratio_of(1.0, 4.0) == 0.25
    assert targets.ratio_of(0.0, 4.0) == 0.0
    assert targets.ratio_of(None, 4.0) is None
    assert targets.ratio_of(1.0, None) is None
    assert targets.ratio_of(1.0, 0.0) is None


def rows(*measures: tuple[str, str, float, float]) -> dict[tuple[str, str], targets.Row]:
    found = Measures(Measure(load, key, at, "", median, median, 1) for load, key, at, median in measures)
    return {(row.name, row.of): row for row in targets.rows(found)}


def test_times_are_compared_with_bare_calls_and_with_stock() -> None:
    found = rows(("put", OURS, STATE, 0.24), ("put", LUA, STATE, 0.2), ("put", STOCK, STATE, 0.5))
    assert found["put", "one bare Lua call with the same bytes"].ratio == pytest.approx(1.2)
    assert found["put", "one bare Lua call with the same bytes"].met
    assert found["put", "stock on one connection"].ratio == pytest.approx(0.48)
    assert not found["put", "stock on one connection"].met


def test_rates_are_compared_with_stock_with_the_lock_free_stock_and_with_the_ceiling() -> None:
    name = "50 concurrent threads, burst, states made before"
    found = rows(
        *(("burst", key, 50, rate) for key, rate in ((OURS, 6.0), (POOLED, 0.5), (LOCK_FREE, 1.5), (MEMORY, 9.0)))
    )
    assert found[name, "stock on a pool"].met
    assert not found[name, "stock without its lock"].met
    assert found[name, "InMemorySaver"].ratio == pytest.approx(6 / 9)


def test_graphs_are_compared_with_the_faster_of_the_two_ways_to_use_stock() -> None:
    found = rows(*(("graph, 10 nodes", key, 100, time) for key, time in ((OURS, 1.0), (STOCK, 3.0), (POOLED, 9.0))))
    row = found["100 concurrent 10-node graphs", "the faster of stock's two"]
    assert row.ratio == pytest.approx(1 / 3)
    assert not row.met


def test_a_put_behind_a_network_is_compared_by_what_the_network_adds() -> None:
    found = rows(
        ("network, put", OURS, 0, 0.5),
        ("network, put", OURS, 2, 2.7),
        ("network, put", "ping", 0, 0.1),
        ("network, put", "ping", 2, 2.3),
    )
    assert found["2 ms of latency: what a put takes longer", "what a ping does"].ratio == pytest.approx(1.0)
