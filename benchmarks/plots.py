"""Pictures of a run: latency by load, throughput by concurrency, cost by state size and by history.

Each is an SVG on white, since it is shown on light and on dark pages. Not here: measuring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.contenders import (
    CONTENDERS,
    LOCK_FREE,
    LUA,
    LUA_PIPELINED,
    MEMORY,
    OURS,
    PLAIN,
    POOLED,
    STOCK,
    UNVERIFIED,
    name_of,
)
from benchmarks.report import number, size_text
from benchmarks.scale import STATE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from benchmarks.measure import Measures

_COLOURS = {
    OURS: "#0b6e4f",
    UNVERIFIED: "#5aae8c",
    "ours, no flusher": "#a3d5c0",
    "ours, fsynced": "#7a9e2f",
    "ours, replicated": "#93b84a",
    "ours, flushed": "#b5cf86",
    STOCK: "#b3261e",
    POOLED: "#e0762f",
    LOCK_FREE: "#f0b429",
    "sqlite": "#7b5ea7",
    PLAIN: "#3f7cac",
    "valkey": "#8ab6d6",
    "redisjson": "#1d4e79",
    MEMORY: "#444444",
    LUA: "#999999",
    LUA_PIPELINED: "#999999",
}
_OTHER = "#bbbbbb"


def draw(folder: Path, measures: Measures) -> list[Path]:
    """Draw what there are measures for; returns the files."""
    drawn = []
    # Shapes instead of text need no font where the picture is shown, and the same run gives the same bytes.
    with mpl.rc_context(
        {"svg.hashsalt": "benchmarks", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        for name, make in PICTURES.items():
            figure = make(measures)
            if figure is not None:
                path = folder / f"{name}.svg"
                figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
                drawn.append(path)
    return drawn


def _figure(columns: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _bars(
    axes: Axes,
    measures: Measures,
    load: str,
    at: float,
    keys: Sequence[str],
    title: str,
    unit: str,
    *,
    names: bool,
    scale: float = 1.0,
    least: float | None = None,
) -> None:
    """Draw the medians of one load as bars, with thin lines up to the 99th percentile.

    The axis is linear from 0, or with `least` logarithmic from there.
    """
    rows = list(reversed(keys))
    found = [(place, key, one) for place, key in enumerate(rows) if (one := measures.find(load, key, at))]
    for place, key, one in found:
        median, p99 = one.median / scale, one.p99 / scale
        axes.barh(place, median, color=_COLOURS.get(key, _OTHER))
        axes.plot([median, p99], [place, place], color="#333333", linewidth=0.8)
        axes.annotate(number(median), (p99, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name_of(key) for key in rows] if names else [""] * len(rows))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit)
    most = max(one.p99 for _, _, one in found) / scale
    if least is None:
        axes.set_xlim(0, most * 1.2)
    else:
        axes.set_xscale("log")
        axes.set_xlim(least, most * 4)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _measured(measures: Measures, loads: Sequence[str]) -> list[str]:
    """Return who was measured at one of some loads, in the usual order."""
    found = {key for load in loads for key in measures.contenders(load)}
    return [key for key in (*CONTENDERS, LUA) if key in found]


def _lines(
    axes: Axes,
    measures: Measures,
    load: str,
    keys: Sequence[str],
    point: Callable[[float], str],
    label: str,
    unit: str,
    title: str,
    *,
    log_x: bool = True,
    log_y: bool = True,
) -> None:
    points = measures.points(load)
    for key in keys:
        found = [(at, m.median) for at in points if (m := measures.find(load, key, at))]
        if found:
            axes.plot(
                [at for at, _ in found],
                [median for _, median in found],
                marker="o",
                markersize=4,
                linewidth=2 if key == OURS else 1.3,
                color=_COLOURS.get(key, _OTHER),
                linestyle=":" if key in (LUA, LUA_PIPELINED, MEMORY) else "-",
                label=name_of(key),
            )
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(points, [point(at) for at in points])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    shown: dict[str, Artist] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            shown.setdefault(str(label), handle)
    figure.legend(
        list(shown.values()),
        list(shown),
        loc="outside lower center",
        ncols=2 if len(axes) == 1 else 3,
        fontsize=8,
        frameon=False,
    )


def latency(measures: Measures) -> Figure | None:
    """Draw single operations."""
    loads = [load for load in ("put", "put_writes", "get_tuple") if STATE in measures.points(load)]
    if not loads:
        return None
    figure, all_axes = _figure(
        len(loads), 11, 4.6, "One call at a time, state of 20 messages (5 KB): median, line to p99"
    )
    keys = _measured(measures, loads)
    for number_, (axes, load) in enumerate(zip(all_axes, loads, strict=True)):
        _bars(axes, measures, load, STATE, keys, load, "milliseconds (logarithmic)", names=number_ == 0, least=0.01)
    return figure


def graphs(measures: Measures) -> Figure | None:
    """Draw whole graphs."""
    loads = [load for load in ("10 nodes", "fan-out", "wide state", "tool agent") if measures.points(f"graph, {load}")]
    if not loads:
        return None
    figure, all_axes = _figure(len(loads), 12, 4, "Graphs run at once by ainvoke: time until all have ended")
    keys = _measured(measures, [f"graph, {load}" for load in loads])
    for number_, (axes, load) in enumerate(zip(all_axes, loads, strict=True)):
        at = measures.points(f"graph, {load}")[-1]
        title = f"{load}, {at:,.0f} at once"
        _bars(axes, measures, f"graph, {load}", at, keys, title, "seconds", names=number_ == 0, scale=1e3)
    return figure


def throughput(measures: Measures) -> Figure | None:
    """Draw bursts by concurrency."""
    if not measures.points("burst"):
        return None
    figure, (axes,) = _figure(1, 8, 5.2, "Burst: each checkpoint is one put and one put_writes, state of 5 KB")
    keys = (OURS, UNVERIFIED, POOLED, STOCK, LOCK_FREE, "sqlite", PLAIN, "valkey", "redisjson", MEMORY, LUA_PIPELINED)
    _lines(axes, measures, "burst", keys, lambda at: f"{at:,.0f}", "concurrent threads", "checkpoints per second", "")
    _legend(figure, [axes])
    return figure


def size(measures: Measures) -> Figure | None:
    """Draw single operations by the size of the state."""
    loads = [load for load in ("put", "get_tuple", "get_tuple, cold") if len(measures.points(load)) > 1]
    if not loads:
        return None
    figure, all_axes = _figure(len(loads), 12, 4.8, "One call at a time by size of the state: median")
    keys = (OURS, UNVERIFIED, STOCK, LOCK_FREE, "sqlite", PLAIN, "valkey", "redisjson", MEMORY, LUA)
    for axes, load in zip(all_axes, loads, strict=True):
        _lines(axes, measures, load, keys, size_text, "size of the state", "milliseconds", load)
    _legend(figure, all_axes)
    return figure


def history(measures: Measures) -> Figure | None:
    """Draw single operations by the length of the history."""
    loads = [load for load in ("put", "get_tuple", "list") if len(measures.points(f"history, {load}")) > 1]
    if not loads:
        return None
    figure, all_axes = _figure(len(loads), 11, 4.2, "One call at a time by length of the thread's history: median")
    for axes, load in zip(all_axes, loads, strict=True):
        title = "list(limit=10)" if load == "list" else load
        _lines(
            axes,
            measures,
            f"history, {load}",
            (OURS, STOCK, POOLED),
            lambda at: f"{at:,.0f}",
            "checkpoints in the thread",
            "milliseconds",
            title,
            log_y=False,
        )
    _legend(figure, all_axes)
    return figure


def network(measures: Measures) -> Figure | None:
    """Draw puts and a graph by the network's latency."""
    loads = [load for load in ("put", "graph of 10 nodes") if len(measures.points(f"network, {load}")) > 1]
    if not loads:
        return None
    figure, all_axes = _figure(len(loads), 9, 4.2, "Servers behind a network: median")
    for axes, load in zip(all_axes, loads, strict=True):
        _lines(
            axes,
            measures,
            f"network, {load}",
            (OURS, STOCK, POOLED, LOCK_FREE),
            lambda at: f"{at:g}",
            "added milliseconds per round trip",
            "milliseconds",
            load,
            log_x=False,
            log_y=False,
        )
    _legend(figure, all_axes)
    return figure


PICTURES: dict[str, Callable[[Measures], Figure | None]] = {
    "latency": latency,
    "throughput": throughput,
    "graphs": graphs,
    "size": size,
    "history": history,
    "network": network,
}
