"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benchmarks import plots, report, scale, servers
from benchmarks.lab import Lab
from benchmarks.loads import LOADS
from benchmarks.measure import Measures

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.targets import Row

app = typer.Typer(add_completion=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Where results.json, results.md and the pictures go.")] = Path(
        "benchmark-results"
    ),
    postgres_uri: Annotated[
        str | None, typer.Option(envvar="BENCH_POSTGRES_URI", help="A Postgres in which databases may be made.")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(envvar="BENCH_REDIS_URL", help="A Redis or Valkey.")] = None,
    search_url: Annotated[
        str | None, typer.Option(envvar="BENCH_SEARCH_URL", help="A Redis with JSON and Search, for RedisSaver.")
    ] = None,
    only: Annotated[str, typer.Option(help=f"Some loads, with commas: {', '.join(LOADS)}.")] = "",
    quick: Annotated[bool, typer.Option(help="A smoke run: every load, a little of each.")] = False,
    full: Annotated[bool, typer.Option(help="A long run: more of everything.")] = False,
    remake: Annotated[
        Path | None, typer.Option("--report", help="Make table and pictures anew from this results.json.")
    ] = None,
) -> None:
    """Measure LangGraph checkpoint savers against each other; servers that are not given are started."""
    console = Console(stderr=True)
    output.mkdir(parents=True, exist_ok=True)
    if remake is not None:
        facts, measures, notes = report.read(remake)
        rows = report.write(output, facts, measures, notes)
    else:
        names = [name.strip() for name in only.split(",") if name.strip()] or list(LOADS)
        if unknown := set(names) - set(LOADS):
            raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}", param_hint="--only")
        if quick and full:
            raise typer.BadParameter("--quick or --full, not both", param_hint="--full")
        size = scale.QUICK if quick else scale.FULL if full else scale.DEFAULT
        with servers.serve(postgres_uri, redis_url, search_url) as found:
            facts = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **servers.describe(found)}
            facts["command"] = _command(only, quick=quick, full=full)
            facts["scale"] = ", ".join(f"{name} {value}" for name, value in asdict(size).items())
            begun = time.monotonic()
            lab = Lab(found, size, lambda text: console.log(text))

            def write() -> list[Row]:
                facts["minutes"] = f"{(time.monotonic() - begun) / 60:.1f}"
                return report.write(output, facts, lab.results.measures(), lab.results.notes)

            asyncio.run(_run(lab, names, write))
            rows, measures, notes = write(), lab.results.measures(), lab.results.notes
    plots.draw(output, Measures(measures))
    report.show(Console(), rows)
    for note in notes:
        console.print(f"[dim]{note}[/dim]")
    console.print(f"{sum(row.met for row in rows)} of {len(rows)} targets met; see {output}/results.md")


def _command(only: str, *, quick: bool, full: bool) -> str:
    # Without where the results went and which servers were given: they belong to one machine.
    size = [f"--{name}" for name, is_given in (("quick", quick), ("full", full)) if is_given]
    return " ".join(["python -m benchmarks", *([f"--only {only}"] if only else []), *size])


async def _run(lab: Lab, names: list[str], write: Callable[[], object]) -> None:
    for name, load in LOADS.items():
        if name in names:
            try:
                await load(lab)
            except Exception as exc:  # noqa: BLE001 - what was measured so far is worth a report
                lab.say(f"the load {name} has failed: {exc!r}")
                lab.results.remark(f"the load {name} could not be done: {type(exc).__name__}: {exc}")
            write()  # a run that is ended early leaves what it has found so far; --report draws it


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    app()
