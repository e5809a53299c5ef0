"""Values on their way to JSONB: what Postgres cannot hold is found, replaced and reported, never silently.

Not here: when this runs and who hears of a change (`records.py`, `flush/`). Nothing here does I/O, and no
argument is ever changed in place.

A *non-finite* number is NaN, Infinity or -Infinity. A *container* is a dict, list, tuple, set, frozenset or
deque, subclasses included; only containers are entered, so that arrays, dataclasses, models, Decimals and
messages stay as they are: the serializer stores them without loss. A *path* names a place in a value:
`channel_values.scores[3].x`, a key that is no identifier as `["two words"]`, an element of a set as `{}`.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import deque
from dataclasses import dataclass, fields, is_dataclass
from decimal import Decimal
from math import copysign, inf, isfinite
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

import orjson

from checkpointer.errors import NonFiniteValueError, UnserializableValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

NonFinite = Literal["null", "keep", "raise"]
"""What becomes of a non-finite number: None and a report, nothing, or an error."""

ChangeKind = Literal["nan", "infinity", "-infinity", "nul", "surrogate"]


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that was changed.

    Attributes:
        path: Where it was. An object that is reached on several ways is named by the first.
        kind: `nan`, `infinity` and `-infinity` became None, `nul` characters were removed, each lone
            `surrogate` became U+FFFD.
    """

    path: str
    kind: ChangeKind


# --- paths ---

_KEY_LIMIT = 80
_STEPS_SHOWN = 32

# A dict with a key, a sequence with an index, or a dataclass with a field's name.
_Step: TypeAlias = tuple[Any, Any]


def _step_text(container: Any, position: Any) -> str:
    if isinstance(container, dict):
        if isinstance(position, str):
            if position.isidentifier() and len(position) <= _KEY_LIMIT:
                return f".{position}"
            # By way of JSON, so that a NUL or a surrogate in a key does not get into a report.
            return f"[{json.dumps(position[:_KEY_LIMIT])}]"
        plain = position is None or isinstance(position, int | float)
        return f"[{position!r}]"[:_KEY_LIMIT] if plain else f"[<{type(position).__name__}>]"
    if isinstance(container, set | frozenset):
        return "{}"
    if isinstance(position, str):
        return f".{position}"
    names = getattr(container, "_fields", ())
    if isinstance(container, tuple) and position < len(names):
        return f".{names[position]}"
    return f"[{position}]"


def _steps_text(steps: Sequence[_Step]) -> str:
    if len(steps) <= _STEPS_SHOWN:
        return "".join(_step_text(*step) for step in steps)
    # Otherwise a report about deep nesting costs more than the value.
    half = _STEPS_SHOWN // 2
    return f"{_steps_text(steps[:half])}…{_steps_text(steps[-half:])}"


def _path(base: str, steps: Sequence[_Step]) -> str:
    shown = _steps_text(steps)
    return base + shown if base else shown.removeprefix(".")


# --- non-finite numbers ---

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# Objects of these types need no closer look.
_LEAVES = frozenset({str, int, bool, type(None), bytes})


class _CycleError(Exception):
    """A container contains itself."""


class _Frame:
    """A container whose children are being looked at."""

    __slots__ = ("changed", "children", "keys", "position", "source")

    def __init__(self, source: Any) -> None:
        self.source = source
        # Snapshots, since another thread may go on filling a live container.
        if isinstance(source, dict):
            items = tuple(dict.items(source))
            self.keys: tuple[Any, ...] | None = tuple(key for key, _ in items)
            self.children: tuple[Any, ...] = tuple(child for _, child in items)
        else:
            self.keys = None
            self.children = tuple(source)
        self.position = -1
        self.changed: dict[int, Any] = {}

    def step(self) -> _Step:
        return self.source, self.position if self.keys is None else self.keys[self.position]


def sanitize_for_json(value: Any) -> Any:
    """Return the value with None in place of each NaN, Infinity and -Infinity.

    They are replaced at any depth of dict values, lists, tuples, sets, frozensets and deques, be they floats,
    instances of float subclasses or NumPy scalars. Everything else comes back equal: other objects are not
    entered, keys are kept, containers keep their types, and those without a change are shared with the input.
    Nothing to change gives the very same object back, and so does a value that contains itself, which
    LangGraph's serializer refuses anyway.
    """
    return sanitize_value(value, "", "null")[0]


def sanitize_value(value: Any, path: str, mode: NonFinite) -> tuple[Any, list[Change]]:
    """Do what `sanitize_for_json` does, and report it.

    Args:
        value: Any value.
        path: Where the value is; reported paths begin with it.
        mode: `null` replaces and reports, `keep` returns the value as it is, `raise` refuses.

    Returns:
        The value itself if nothing was changed, else its copy; and the changes.

    Raises:
        NonFiniteValueError: The mode is `raise`, and a number is not finite.
    """
    if mode == "keep":
        return value, []
    floating = _numpy_floating()
    kind = _non_finite_kind(value, floating)
    changes: list[Change] = []
    if kind is not None:
        _report(changes, path, (), kind, mode)
        return None, changes
    # Most values have nothing to change, and finding that out is several times faster than a walk with paths.
    if not _holds_non_finite(value, floating):
        return value, []
    try:
        return _without_non_finite(value, path, mode, floating, changes), changes
    except _CycleError:
        return value, []


def _report(changes: list[Change], base: str, steps: Sequence[_Step], kind: ChangeKind, mode: NonFinite) -> None:
    path = _path(base, steps)
    if mode == "raise":
        name = {"nan": "NaN", "infinity": "Infinity"}.get(kind, "-Infinity")
        raise NonFiniteValueError(
            f"{path or 'The value'} is {name}, and non_finite='raise' refuses it. Replace it, for example by "
            "None, or choose non_finite='null' or 'keep'."
        )
    changes.append(Change(path, kind))


def _numpy_floating() -> Any:
    """Return the class of NumPy's float scalars; what `isinstance` never matches if NumPy is not in use."""
    numpy = sys.modules.get("numpy")
    return getattr(numpy, "floating", ()) if numpy is not None else ()


def _non_finite_kind(value: Any, floating: Any) -> ChangeKind | None:
    if isinstance(value, float):
        if isfinite(value):
            return None
        value = float.__float__(value)  # a subclass may compare as it likes
    elif not isinstance(value, floating):
        return None
    # By comparison: subtracting would make NumPy warn, and float() would make Infinity of a large longdouble.
    if value != value:  # true of NaN only
        return "nan"
    if value == inf:
        return "infinity"
    return "-infinity" if value == -inf else None


def _holds_non_finite(root: Any, floating: Any) -> bool:
    if not isinstance(root, _CONTAINERS):
        return False
    seen = {id(root)}
    todo = [root]
    while todo:
        container = todo.pop()
        children = tuple(dict.values(container) if isinstance(container, dict) else container)
        types = set(map(type, children))
        if types <= _LEAVES:
            continue
        if types == {float}:
            if not all(map(isfinite, children)):
                return True
            continue
        for child in children:
            if type(child) in _LEAVES:
                continue
            if isinstance(child, _CONTAINERS):
                if id(child) not in seen:
                    seen.add(id(child))
                    todo.append(child)
            elif _non_finite_kind(child, floating) is not None:
                return True
    return False


def _without_non_finite(root: Any, base: str, mode: NonFinite, floating: Any, changes: list[Change]) -> Any:
    # A stack of its own, since values nest deeper than Python recurses. Containers are told apart by
    # identity: one that is met again after it was left is done, one that is met inside itself is a cycle.
    finished: dict[int, Any] = {}
    entered = {id(root)}
    frames = [_Frame(root)]
    while True:
        frame = frames[-1]
        for position in range(frame.position + 1, len(frame.children)):
            frame.position = position
            child = frame.children[position]
            if type(child) in _LEAVES:
                continue
            if isinstance(child, _CONTAINERS):
                key = id(child)
                if key in finished:
                    if finished[key] is not child:
                        frame.changed[position] = finished[key]
                elif key in entered:
                    raise _CycleError
                else:
                    entered.add(key)
                    frames.append(_Frame(child))
                    break
            elif (kind := _non_finite_kind(child, floating)) is not None:
                _report(changes, base, [each.step() for each in frames], kind, mode)
                frame.changed[position] = None
        else:
            frames.pop()
            clean = _rebuilt(frame) if frame.changed else frame.source
            if not frames:
                return clean
            finished[id(frame.source)] = clean
            if clean is not frame.source:
                frames[-1].changed[frames[-1].position] = clean


def _rebuilt(frame: _Frame) -> Any:
    """Return a copy of the frame's container, of the same type, with the changed children."""
    source = frame.source
    kind = type(source)
    items = [frame.changed.get(position, child) for position, child in enumerate(frame.children)]
    if frame.keys is not None and kind is dict:
        return dict(zip(frame.keys, items, strict=True))
    if kind is list or kind is tuple or kind is set or kind is frozenset:
        return kind(items)
    try:
        return _rebuilt_subclass(source, frame, items)
    except Exception:  # noqa: BLE001 - a subclass may refuse anything; its plain form is what gets stored anyway
        plain = next(base for base in _CONTAINERS if isinstance(source, base))
        return dict(zip(frame.keys, items, strict=True)) if frame.keys is not None else plain(items)


def _rebuilt_subclass(source: Any, frame: _Frame, items: list[Any]) -> Any:
    kind = type(source)
    if isinstance(source, tuple):
        # _make and tuple.__new__ go around a __new__ that has other parameters.
        return kind._make(items) if hasattr(kind, "_make") else tuple.__new__(kind, items)
    if isinstance(source, frozenset):
        return kind(items)
    clone = copy.copy(source)  # keeps what the subclass adds, such as a default factory or a maximal length
    if clone is source or type(clone) is not kind:
        raise TypeError(f"{kind.__name__} does not copy itself")
    if frame.keys is not None:
        for position, child in frame.changed.items():
            clone[frame.keys[position]] = child
    elif isinstance(source, list):
        clone[:] = items
    else:
        clone.clear()
        (clone.update if isinstance(source, set) else clone.extend)(items)
    return clone


# A float of msgpack is 0xCB and eight bytes, big-endian; a non-finite one has all eleven bits of the exponent
# set. ormsgpack writes no 32-bit floats (0xCA), and extension types embed their parts as they are, so that
# nothing hides one. It refuses NumPy's scalars and other subclasses of float.
_NON_FINITE_FLOAT = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")


def may_hold_non_finite(data: bytes) -> bool:
    """Tell whether bytes of LangGraph's msgpack serializer may hold a non-finite float.

    False is certain: `sanitize_value` would not change the value. True may also come from a key, from within
    an object or an array, or from chance (once in half a million random bytes). Says nothing about encrypted,
    compressed or pickled data.
    """
    return _NON_FINITE_FLOAT.search(data) is not None


# --- JSON for JSONB ---

# Python's own encoder recurses and gives up below this, and orjson decodes 1,024 levels.
_DEPTH_LIMIT = 1_000

# Postgres's numeric has this many digits before the point.
_DIGITS_LIMIT = 131_072

# Integers of up to so many bits can be written whatever limit the interpreter has (normally 4,300 digits).
_BITS_ALWAYS_WRITABLE = 2_000

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

_MAX_INT64_AS_FLOAT = 2.0**63


def dump_json(value: Any, path: str, mode: NonFinite) -> tuple[bytes, list[Change]]:
    """Encode a value of dicts, sequences and scalars as JSON that JSONB accepts.

    Where `json.dumps` gives text that JSONB takes, the stored value is the same. Besides, NUL characters are
    removed from strings and keys, lone surrogates become U+FFFD, and numbers are written as JSONB will give
    them back: it keeps decimal numbers, so that 1e16 returns as an int and -0.0 as 0.0. Decoding the text
    therefore gives what reading the row gives.

    Args:
        value: What to encode.
        path: Where the value is; reported paths begin with it.
        mode: `null` and `keep` write null for a non-finite number, as JSONB has none; `raise` refuses.

    Returns:
        UTF-8 text, and the changes.

    Raises:
        NonFiniteValueError: The mode is `raise`, and a number is not finite.
        UnserializableValueError: Something is no JSON, too large for it, or contains itself.
    """
    try:
        text = orjson.dumps(value)
    except TypeError:
        # Also for what only orjson refuses: keys that are no strings, integers over 64 bits, surrogates.
        pass
    else:
        if _is_written_alike(value) and not (b"\\" in text and b"\\u0000" in text):
            return text, []
    return _Plain(path, mode).dump(value)


_WRITTEN_ALIKE = {str, int, bool, type(None)}


def _is_written_alike(value: Any) -> bool:
    """Tell whether what orjson wrote for a value is what `json.dumps` and JSONB would make of it.

    The value does not contain itself, as orjson has walked it. Anything but the plain types is doubtful:
    orjson also writes dataclasses, UUIDs, dates and enums, which `json.dumps` refuses.
    """
    todo: list[Any] = [(value,)]
    for container in todo:
        children = container.values() if type(container) is dict else container
        if set(map(type, children)) <= _WRITTEN_ALIKE:
            continue
        for child in children:
            kind = type(child)
            if kind is str or kind is int or child is None or kind is bool:
                continue
            if kind is dict or kind is list or kind is tuple:
                todo.append(child)
            elif kind is not float or not -1e15 < child < 1e15 or (child == 0 and copysign(1, child) < 0):
                return False
    return True


def _number_in_jsonb(number: float) -> float:
    """Return what a finite number is when it comes back from JSONB."""
    if -1e16 < number < 1e16:
        return number + 0.0  # -0.0 becomes 0.0
    return int(Decimal(float.__repr__(number)))


def _is_writable(number: int) -> bool:
    """Tell whether both Python and Postgres take the integer's decimal digits."""
    if int.bit_length(number) <= _BITS_ALWAYS_WRITABLE:
        return True
    try:
        return len(int.__repr__(number).lstrip("-")) <= _DIGITS_LIMIT
    except ValueError:
        return False


class _Plain:
    """Makes a value plain: only dicts with string keys, lists, and scalars that JSONB can hold."""

    def __init__(self, base: str, mode: NonFinite) -> None:
        self._base = base
        self._mode = mode
        self._changes: list[Change] = []
        self._floating = _numpy_floating()

    def dump(self, value: Any) -> tuple[bytes, list[Change]]:
        plain = self._plain(value)
        try:
            return _encoder.encode(plain).encode(), self._changes
        except RecursionError as exc:
            raise UnserializableValueError(
                f"{self._base or 'The value'} is nested too deeply for JSON. Flatten it."
            ) from exc

    def _plain(self, root: Any) -> Any:
        # Each copy gets its place before it is filled, so that the order stays and nothing recurses.
        # A way is a linked list of steps from the innermost, as most are never looked at.
        result = self._copy_or_scalar(root, None)
        todo: list[tuple[Any, Any, Any, int]] = []
        if isinstance(result, dict | list):
            todo.append((root, result, None, 1))
        while todo:
            source, copied, outer, depth = todo.pop()
            if depth > _DEPTH_LIMIT:
                self._refuse(outer, f"is nested deeper than {_DEPTH_LIMIT:,} levels, or contains itself")
            entries: Iterable[tuple[Any, Any]] = (
                tuple(source.items()) if isinstance(source, dict) else enumerate(tuple(source))
            )
            for position, child in entries:
                way = (outer, (source, position))
                new = self._copy_or_scalar(child, way)
                if isinstance(copied, dict):
                    copied[self._key(position, way)] = new
                else:
                    copied.append(new)
                if isinstance(new, dict | list):
                    todo.append((child, new, way, depth + 1))
        return result

    def _copy_or_scalar(self, value: Any, way: Any) -> Any:
        """Return an empty copy of a container, or a scalar as JSONB will hold it."""
        # In the order in which the standard library asks: a str-Enum is a string, an int-Enum an int.
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(value, way)
        if isinstance(value, int):
            return self._integer(value, way)
        kind = _non_finite_kind(value, self._floating)
        if kind is not None:
            _report(self._changes, self._base, _steps(way), kind, self._mode)
            return None
        if isinstance(value, float):
            return _number_in_jsonb(float.__float__(value))
        if isinstance(value, list | tuple):
            return []
        if isinstance(value, dict):
            return {}
        return self._refuse(way, f"is of type {type(value).__name__}, which JSON does not have")

    def _key(self, key: Any, way: Any) -> str:
        if isinstance(key, str):
            return self._text(key, way)
        if isinstance(key, float):
            # Becomes a string, for which NaN is no problem, and is written as `json.dumps` writes it.
            kind = _non_finite_kind(key, ())
            names: dict[ChangeKind | None, str] = {
                "nan": "NaN",
                "infinity": "Infinity",
                "-infinity": "-Infinity",
            }
            return names.get(kind) or float.__repr__(key)
        if key is None or key is True or key is False:
            return {None: "null", True: "true", False: "false"}[key]
        if isinstance(key, int):
            return int.__repr__(self._integer(key, way))
        return self._refuse(way, f"has a key of type {type(key).__name__}, which JSON does not have")

    def _integer(self, value: int, way: Any) -> int:
        if not _is_writable(value):
            self._refuse(way, "is an integer with too many digits")
        return value

    def _text(self, text: str, way: Any) -> str:
        text = str.__str__(text)
        if "\0" in text:
            text = text.replace("\0", "")
            self._change(way, "nul")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                # UTF-16 joins the halves of a pair, as JSONB does, and replaces those that are alone.
                joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                if joined.count("\ufffd") > text.count("\ufffd"):
                    self._change(way, "surrogate")
                return joined
        return text

    def _change(self, way: Any, kind: ChangeKind) -> None:
        self._changes.append(Change(_path(self._base, _steps(way)), kind))

    def _refuse(self, way: Any, why: str) -> NoReturn:
        path = _path(self._base, _steps(way)) or "The value"
        raise UnserializableValueError(
            f"{path} {why}. Store there only None, booleans, numbers, strings, lists and dicts."
        )


def _steps(way: Any) -> list[_Step]:
    steps = []
    while way is not None:
        way, step = way
        steps.append(step)
    steps.reverse()
    return steps


def load_json(data: bytes | memoryview) -> Any:
    """Decode JSON text, with integers of any size exact.

    Raises:
        ValueError: It is no JSON.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        # The standard library takes deeper nesting and longer numbers, or words the error.
        return json.loads(bytes(data))
    # orjson makes a float of an integer over 64 bits, without a word.
    return json.loads(bytes(data)) if _holds_large_float(value) else value


def _holds_large_float(value: Any) -> bool:
    todo: list[Any] = [(value,)]
    for container in todo:
        children = container.values() if type(container) is dict else container
        if set(map(type, children)) <= _WRITTEN_ALIKE:
            continue
        for child in children:
            kind = type(child)
            if kind is str:
                continue
            if kind is dict or kind is list:
                todo.append(child)
            elif kind is float and not -_MAX_INT64_AS_FLOAT < child < _MAX_INT64_AS_FLOAT:
                return True
    return False


def is_inlinable(value: Any) -> bool:
    """Tell whether a channel's value can stand in the checkpoint's JSONB.

    LangGraph puts None, booleans, numbers and strings there. Those that JSONB would refuse are not inlinable;
    out of a blob, LangGraph's own saver reads them as well.
    """
    if isinstance(value, str):
        if "\0" in value:
            return False
        if value.isascii():
            return True
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return _is_writable(value)
    return isinstance(value, float) and isfinite(value)


# --- the second pass ---

_SUSPICIOUS_ESCAPE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")


def sanitize_json_text(text: bytes) -> tuple[bytes, list[Change]]:
    """Replace what JSONB refuses in JSON text: NaN, Infinity, NUL, lone surrogates, bytes that are no UTF-8.

    Words in strings are no numbers, and an escaped backslash before `u0000` is no NUL: those stay.

    Returns:
        The very same object and no changes, or new text and the changes.

    Raises:
        UnserializableValueError: The text holds something suspicious and is no JSON besides.
    """
    if not _is_suspicious(text):
        return text, []
    try:
        # A byte that is no UTF-8 becomes a lone surrogate here, and is then replaced like one.
        value = json.loads(text.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as exc:
        raise UnserializableValueError(
            f"The stored text is no JSON ({type(exc).__name__}). It was damaged after it was written."
        ) from exc
    clean, changes = dump_json(value, "", "null")
    return (clean, changes) if changes else (text, [])


def _is_suspicious(text: bytes) -> bool:
    if b"NaN" in text or b"Infinity" in text:
        return True
    if b"\\" in text and _SUSPICIOUS_ESCAPE.search(text) is not None:
        return True
    if text.isascii():
        return False
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False


# --- what the serializer refuses ---

# A reader decodes JSON by recursion, below whatever is on its stack already.
_FALLBACK_DEPTH_LIMIT = 500

# LangGraph makes an object of a dict that has this key.
_REVIVED_KEY = "lc"

_JSON_SCALARS = frozenset({str, int, float, bool, type(None)})


def json_fallback(value: Any) -> bytes | None:
    """Return JSON text that LangGraph's serializer reads back as the equal value, or None if there is none.

    For integers over 64 bits, which msgpack does not have. Only dicts with string keys, lists, strings, ints,
    finite floats, booleans and None come back from JSON as they went in; subclasses, tuples and sets do not.
    """
    todo: list[tuple[Any, int]] = [((value,), 0)]
    while todo:
        container, depth = todo.pop()
        if depth > _FALLBACK_DEPTH_LIMIT:
            return None
        if type(container) is dict:
            if _REVIVED_KEY in container or any(type(key) is not str for key in container):
                return None
            container = container.values()
        for child in container:
            kind = type(child)
            if kind is dict or kind is list:
                todo.append((child, depth + 1))
            elif kind not in _JSON_SCALARS:
                return None
    try:
        return _encoder.encode(value).encode()
    except (
        ValueError,
        RecursionError,
    ):  # non-finite, a surrogate, too many digits, a stack that is nearly full
        return None


_ATTEMPTS_LIMIT = 2_000


def find_unserializable(value: Any, dumps: Callable[[Any], Any]) -> str:
    """Return the path, below the value, of the deepest part that `dumps` refuses.

    Containers and dataclasses are entered. The path begins with `.`, `[` or `{`, to be appended to the
    value's own, and is empty if only the value as a whole is refused. It may end early in a very deep value,
    since about 2,000 calls of `dumps` are made at most.
    """
    steps: list[_Step] = []
    attempts = 0

    def is_refused(candidate: Any) -> bool:
        nonlocal attempts
        attempts += 1
        try:
            dumps(candidate)
        except Exception:  # noqa: BLE001 - a serializer may raise anything
            return True
        return False

    entered: set[int] = set()
    while attempts < _ATTEMPTS_LIMIT and id(value) not in entered:
        entered.add(id(value))
        entry = _refused_entry(value, is_refused)
        if entry is None:
            break
        position, part = entry
        steps.append((value, position))
        value = part  # if its key is what is refused, nothing in it is, and the next turn ends
    return _steps_text(steps)


def _refused_entry(value: Any, is_refused: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """Return one entry that is refused, found by halving; None if no entry alone is."""
    if isinstance(value, dict):
        entries = list(dict.items(value))
    elif isinstance(value, _CONTAINERS):
        entries = list(enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        entries = [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    else:
        return None

    def holds_refused(some: list[tuple[Any, Any]]) -> bool:
        return bool(some) and is_refused(dict(some) if isinstance(value, dict) else [part for _, part in some])

    if not holds_refused(entries):
        return None
    while len(entries) > 1:
        half = len(entries) // 2
        entries = next((some for some in (entries[:half], entries[half:]) if holds_refused(some)), [])
    return entries[0] if entries else None
