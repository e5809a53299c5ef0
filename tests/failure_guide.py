"""Writes into `docs/failure-guide.md` what can be seen of some failures, and reads the document.

`python tests/failure_guide.py --write` produces these failures on servers of its own and replaces the parts of the
document between `<!-- name -->` and `<!-- /name -->`. What differs each time stands there as `<what it is>`. Not here:
what goes wrong (`failures.py`) and where it is looked at (`scenes.py`).
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from failures import FAILURES
from scenes import THREAD, Scene

from checkpointer import embedded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scenes import Sight

DOCUMENT = Path(__file__).parents[1] / "docs" / "failure-guide.md"

_COLUMNS = (
    "error_type",
    "severity",
    "occurrences",
    "thread_id",
    "error_message",
    "error_code",
    "outcome",
    "delivery",
    "error_context",
    "stack_trace",
    "resolved_by",
    "resolution_notes",
)
_OF_THE_API = (
    "id",
    "error_type",
    "severity",
    "thread_id",
    "error_message",
    "created_at",
    "occurrences",
    "fingerprint",
    "delivery",
    "outcome",
    "component",
    "operation",
    "resolved_at",
    "resolved_by",
)
# What the application does here to have something to be called for.
_NOTE = "application.note"
_VOLATILE = (
    (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "<uuid>"),
    (r"\bv1:[0-9a-f]{32}\b", "<fingerprint>"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?(?:\+00:00|Z)?", "<time>"),
    (r"(127\.0\.0\.1|localhost):\d+", r"\1:<port>"),
    (r"\bport \d{4,5}\b", "port <port>"),
    (r"\bafter \d+\.\d+ s", "after <n> s"),
    (r'"seconds": \d+(?:\.\d+)?', '"seconds": "<n>"'),
    (r'("id"): \d+', r'\1: "<id>"'),
)
# They count attempts, of which there are more on a slow machine.
_UNSTEADY = ("flush_failures_total", "operation_failures_total")
_COUNTERS = ("events_total", "puts_around_total", "dead_letters_total", "hook_failures_total", *_UNSTEADY)


def parts() -> dict[str, str]:
    """Return the produced parts of the document by the names of their failures."""
    found = re.findall(r"^<!-- ([a-z-]+) -->\n(.*?)^<!-- /\1 -->$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


def table() -> list[tuple[str, str, str, str]]:
    """Return the rows of the table: symptom, event, meaning and action."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return [row for row in rows if row[1].startswith("`")]


def render(sight: Sight) -> str:
    """Write down what was seen."""
    views = (
        ("What the call raised", "text", "\n".join(f"{name}: {text}" for name, text in sight.raised)),
        ("The console", "text", _on_the_console(sight)),
        ("The log of the thread `chat-1`", "text", _in_the_log(sight)),
        ("The browser that shows it", "json", "\n".join(_json(view) for view in sight.browser)),
        ("The rows of `system_errors`", "text", _in_the_table(sight)),
        ("The answer of `GET /admin/system-errors?state=all`", "json", _from_the_api(sight)),
        ("What has risen at `/metrics`", "text", _in_the_metrics(sight)),
    )
    return "\n".join(_block(*view) for view in views)


def _block(title: str, language: str, text: str) -> str:
    return f"*{title}*\n\n```{language}\n{_plain(text)}\n```\n" if text else f"*{title}*: nothing.\n"


def _plain(text: str) -> str:
    for pattern, instead in _VOLATILE:
        text = re.sub(pattern, instead, text)
    return text


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False)


def _on_the_console(sight: Sight) -> str:
    lines: list[str] = []
    for entry in sight.console:
        first, *stack = entry.split("\n")
        if f" {_NOTE}: " not in first:
            lines += [first, *(["  | ...", stack[-1]] if stack else [])]
    return "\n".join(lines)


def _in_the_log(sight: Sight) -> str:
    return "\n".join(f"{line['level']}: {line['message']}" for line in sight.log if line["thread_id"] == THREAD)


def _in_the_table(sight: Sight) -> str:
    return "\n\n".join(
        "\n".join(f"{name:<16} {_cell(name, row[name])}" for name in _COLUMNS if row[name] is not None)
        for row in sight.rows
    )


def _cell(name: str, value: Any) -> str:
    if name == "stack_trace":
        return f"... {value.splitlines()[-1]}"
    return _json(value) if isinstance(value, dict) else str(value)


def _from_the_api(sight: Sight) -> str:
    # Newest first, and what is of one moment by its message: rows arrive by several ways.
    return "\n".join(
        _json({name: error[name] for name in _OF_THE_API if error[name] is not None}) for error in sight.listed
    )


def _in_the_metrics(sight: Sight) -> str:
    lines = []
    for sample, value in sight.metrics.items():
        name = sample.partition("{")[0].removeprefix("checkpointer_")
        if value and name in _COUNTERS and _NOTE not in sample:
            lines.append(f"{sample} {'<n>' if name in _UNSTEADY else int(value)}")
    return "\n".join(sorted(lines))


def write(names: Iterable[str]) -> None:
    """Produce failures and replace their parts of the document."""
    text = DOCUMENT.read_text()
    wanted = set(names)
    with (
        tempfile.TemporaryDirectory() as spools,
        embedded.servers(valkey_args=("--appendfsync", "always")) as servers,
    ):
        os.environ["CHECKPOINTER_SPOOL_DIR"] = spools
        for failure in FAILURES:
            if failure.name in wanted:
                with Scene(servers) as here:
                    failure.produce(here)
                    seen = render(here.look())
                begin, end = f"<!-- {failure.name} -->\n", f"<!-- /{failure.name} -->"
                before, _, rest = text.partition(begin)
                text = f"{before}{begin}\n{seen}\n{end}{rest.partition(end)[2]}"
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("Usage: python tests/failure_guide.py --write")
    write(parts())
