"""Makes any value fit to be stored and shown: JSON that Postgres takes, with secrets blanked.

Two dangers meet here. Text can hold what Postgres refuses (NUL, lone surrogates, NaN), and an application's
context or an exception's message can hold credentials. Not here: the state of a run, which the saver
sanitises losslessly; this is lossy on purpose, since a report must be stored whatever it contains.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import itertools
import math
import re
from collections.abc import Collection, Mapping, Set
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

BLANK = "[scrubbed]"
"""Stands where a secret stood."""

_DEPTH_LIMIT = 8
_ITEM_LIMIT = 100
_NODE_LIMIT = 2_000
_TEXT_LIMIT = 4_000

_SECRET_WORDS = (
    r"password|passwd|passphrase|pwd|secret|credential|api[_-]?key|private[_-]?key|access[_-]?key"
    r"|token(?!s|_count|_usage|_limit)|authorization|cookie"
)
_SECRET_KEY = re.compile(_SECRET_WORDS, re.IGNORECASE)

# Every repetition is bounded: a hostile text must not take more than linear time.
_SECRETS_IN_TEXT: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        # The credentials of a URL, up to the last @ of the word, since passwords hold @ and / unescaped.
        (r"(://)[^\s@]{1,300}@(?:[^\s@]{1,300}@){0,5}", rf"\1{BLANK}@"),
        (r"\b(bearer|basic)\s{1,10}[A-Za-z0-9._~+/=-]{6,4000}", rf"\1 {BLANK}"),
        # Headers, to the end of the line.
        (r"\b(cookie|authorization)([\"']?\s{0,10}[:=]\s{0,10})[^\r\n]{1,4000}", rf"\1\2{BLANK}"),
        # Anything named like a secret: key=value, key: value, "key": "value".
        (
            rf"((?:{_SECRET_WORDS})[\w-]{{0,20}}[\"']?\s{{0,10}}[:=]\s{{0,10}})"
            r"(?:\"[^\"]{0,4000}\"|'[^']{0,4000}'|[^\s,;&)}\]]{1,4000})",
            rf"\1{BLANK}",
        ),
        # JSON Web Tokens and the keys of well-known services, whatever stands before them.
        (r"\beyJ[\w-]{8,4000}\.[\w-]{8,4000}(?:\.[\w-]{0,4000})?", BLANK),
        (r"\b(?:sk|pk|rk|xox[abprs])-[\w-]{16,4000}|\bgh[opsur]_\w{20,400}|\bAKIA[0-9A-Z]{16}", BLANK),
    )
)


def safe_text(text: str, limit: int = _TEXT_LIMIT) -> str:
    """Return text without secrets that Postgres takes, as TEXT and in JSONB; at most `limit` characters."""
    # A margin beyond the limit, so that a secret is not cut in half before it is recognised.
    text = text[: limit + 8_000].replace("\x00", "\ufffd")
    text = text.encode("utf-8", "replace").decode("utf-8")
    for pattern, replacement in _SECRETS_IN_TEXT:
        text = pattern.sub(replacement, text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# Everything that a terminal or a viewer of logs takes for more than a character: control characters, line separators,
# and those that turn the direction of what follows.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def one_line(text: str) -> str:
    """Return text that stays in its line of a log, whatever it holds: control characters are spelled out."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def safe_name(text: str, limit: int = 1_000) -> str:
    """Return an identifier or a type as text of at most `limit` bytes: more does not fit into an index.

    What has to be changed gets a digest of the original at its end, so that different names stay different.
    """
    clean = text.replace("\x00", "\ufffd").encode("utf-8", "replace")
    if clean == text.encode("utf-8", "surrogatepass") and len(clean) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return clean[: limit - 33].decode("utf-8", "ignore") + "~" + digest


def safe_json(value: Any) -> Any:
    """Return a value made of dict, list, str, int, float, bool and None only, bounded and without secrets.

    Of an object that is none of these only its type is kept: its `repr` could hold anything.
    """
    return _Walk().of(value, _DEPTH_LIMIT)


class _Walk:
    """One walk over a value, which ends early when the value turns out too big."""

    def __init__(self) -> None:
        self._left = _NODE_LIMIT

    def of(self, value: Any, depth: int) -> Any:
        self._left -= 1
        try:
            return self._of(value, depth)
        # The application's own class failed to show itself.
        except Exception:  # noqa: BLE001
            return f"<unreadable {type(value).__name__}>"

    def _of(self, value: Any, depth: int) -> Any:
        if isinstance(value, enum.Enum):
            value = value.value
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return safe_text(str(value))
        if isinstance(value, int):
            # Longer ones break the conversion to decimal text.
            return int(value) if value.bit_length() <= 1_024 else f"<int of {value.bit_length()} bits>"
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        if depth == 0 or self._left <= 0:
            return f"<{type(value).__name__}>"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._mapping({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, depth)
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple | Set):
            return self._items(value, depth)
        return _leaf(value)

    def _items(self, value: Collection[Any], depth: int) -> list[Any]:
        items = [self.of(item, depth - 1) for item in itertools.islice(value, _ITEM_LIMIT)]
        return items if len(value) <= _ITEM_LIMIT else [*items, f"<{len(value) - _ITEM_LIMIT} more>"]

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in itertools.islice(value.items(), _ITEM_LIMIT):
            name = safe_text(key if isinstance(key, str) else str(self.of(key, 1)), 200)
            secret = _SECRET_KEY.search(name) and item is not None and not isinstance(item, bool)
            result[name] = BLANK if secret else self.of(item, depth - 1)
        if len(value) > _ITEM_LIMIT:
            result["..."] = f"<{len(value) - _ITEM_LIMIT} more>"
        return result


def _leaf(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, UUID | Decimal | PurePath | timedelta):
        return safe_text(str(value))
    if isinstance(value, BaseException):
        return safe_text(f"{type(value).__name__}: {value}")
    return f"<{type(value).__name__}>"
