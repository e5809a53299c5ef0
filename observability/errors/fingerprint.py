"""What errors of one kind have in common, as a short text: their fingerprint.

Into it go the error type, the exception's type, the component, the operation, the SQLSTATE, the first line of the
message with everything taken out that differs from one occurrence to the next, and the innermost in-app *frames* as
`module:function`. A frame is *in-app* unless its file is one of an installed package or of the standard library. No
line numbers, so that an edit elsewhere in a file makes no new kind; no raw message, so that a fingerprint tells
nothing.

Other facts or other ways of reading them need another version, so that what is in a database keeps its meaning. `v0:`
is what the migration gave to rows from before there were fingerprints. Not here: what is done with it (`ingest.py`),
and any I/O.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["fingerprint", "fingerprint_of", "normalize", "in_app_frames"]

_VERSION = "v1:"
_LINE_LIMIT = 1_000
# Less than is looked at: where a long line is cut depends on what has been replaced.
_KEPT = 300
_STACK_LIMIT = 16_000
_FRAMES = 3
_SHORTEST_ID = 3

# In this order: what a later pattern would cut in pieces comes first. Every repetition is bounded or of one class of
# characters, so that hostile text takes no more than linear time.
_VARIABLE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\b[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s'\"`<>]{1,1000}", "<url>"),
        (r"'[^'\n]{0,1000}'(?![A-Za-z])|\"[^\"\n]{0,1000}\"|`[^`\n]{0,1000}`", "<text>"),
        (r"[\w.+-]{1,64}@[\w.-]{1,255}", "<address>"),
        (r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?(?:Z|[+-]\d\d:?\d\d)?)?", "<time>"),
        (r"\b\d{1,2}:\d\d(?::\d\d(?:[.,]\d{1,9})?)?\b", "<time>"),
        (r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?\b", "<address>"),
        (r"\[?(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])\]?(?::\d{1,5})?", "<address>"),
        (r"(?<![\w<])[\w-][\w.-]{0,255}:\d{1,5}\b", "<address>"),
        (r"(?<![\w/\\<])(?:[A-Za-z]:\\|~?/|\.{1,2}/)[^\s'\"`<>:,;()]{1,1000}", "<path>"),
        (r"\b(?=[a-fA-F]*\d)[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b", "<n>"),
        # Whatever word has a digit in it: numbers, hex, ids of threads and of runs.
        (r"(?<![\w<])[+-]?[A-Za-z_.-]{0,1000}\d[\w.-]{0,1000}", "<n>"),
        # How many there are of a list differs too.
        (r"(<(?:n|text|time|address|path|url)>)(?:(?:, ?| and | )\1){1,1000}", r"\1"),
        (r"\s+", " "),
    )
)

_FRAME = re.compile(r"^ {2}File \"([^\"\n]{1,1000})\", line \d{1,9}, in ([^\n]{1,300})$", re.MULTILINE)
_NOT_IN_APP = re.compile(r"[/\\](?:site|dist)-packages[/\\]|[/\\]lib(?:64)?[/\\]python\d|^<")
_RELEASE_FOLDER = re.compile(r"\d{3}|^[0-9a-f]{7,}$")


def fingerprint(
    *,
    error_type: str,
    exception_type: str | None = None,
    component: str | None = None,
    operation: str | None = None,
    error_code: str | None = None,
    message: str = "",
    stack: str | None = None,
    ids: Collection[str] = (),
) -> str:
    """Return the fingerprint of an error.

    Args:
        error_type: The class of trouble.
        exception_type: The exception's qualified class.
        component: The part that speaks.
        operation: What it was doing.
        error_code: The SQLSTATE.
        message: The sentence for operators.
        stack: The formatted stack trace.
        ids: Of the thread, the run and the checkpoint: a message that names them is of the same kind as with others.

    Returns:
        `v1:` and 32 hexadecimal digits.
    """
    facts = [
        error_type,
        exception_type or "",
        component or "",
        operation or "",
        error_code or "",
        normalize(message, ids),
        in_app_frames(stack or ""),
    ]
    # Lone surrogates are spelled out by json, so that any text can be encoded.
    return _VERSION + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def fingerprint_of(row: Mapping[str, Any]) -> str:
    """Return the fingerprint of a row of `system_errors`, whatever its values are."""
    context = row.get("error_context")
    return fingerprint(
        error_type=_text(row.get("error_type")),
        exception_type=_text(context.get("exception_type")) if isinstance(context, dict) else None,
        component=_text(row.get("component")),
        operation=_text(row.get("operation")),
        error_code=_text(row.get("error_code")),
        message=_text(row.get("error_message")),
        stack=_text(row.get("stack_trace")),
        ids=[known for name in ("thread_id", "run_id", "checkpoint_id") if (known := _text(row.get(name)))],
    )


def normalize(message: str, ids: Collection[str] = ()) -> str:
    """Return the first line of a message, with placeholders for what differs between occurrences of one kind."""
    line = next((line for line in message[: 4 * _LINE_LIMIT].splitlines() if line.strip()), "")[:_LINE_LIMIT]
    # By a number, which any of the patterns takes for a part of what it stands in. Shorter ones are too likely to be a
    # word of the sentence.
    for known in sorted(ids, key=len, reverse=True):
        if len(known) >= _SHORTEST_ID:
            line = re.sub(rf"(?<!\w){re.escape(known)}(?!\w)", "0", line)
    for pattern, replacement in _VARIABLE:
        line = pattern.sub(replacement, line)
    return line.strip()[:_KEPT]


def in_app_frames(stack: str) -> list[str]:
    """Return the innermost in-app frames of a formatted stack as `module:function`, each once, sorted.

    Sorted and once each, since in a recursion the depth decides which of them comes last. A module goes by the name of
    its file and of the folder around it: where the application is installed differs between machines and releases.
    """
    found: list[str] = []
    for path, function in reversed(_FRAME.findall(stack[-_STACK_LIMIT:])):
        if _NOT_IN_APP.search(path):
            continue
        frame = f"{_module(path)}:{function}"
        if frame not in found:
            found.append(frame)
        if len(found) == _FRAMES:
            break
    return sorted(found)


def _module(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part]
    names = [part.removesuffix(".py") for part in parts[-2:]]
    if names[-1] == "__init__" and len(names) > 1:
        names = names[:1]
    return ".".join(name for name in names if name is names[-1] or not _RELEASE_FOLDER.search(name))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
