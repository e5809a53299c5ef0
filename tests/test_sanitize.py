"""What sanitising promises: what JSONB refuses is replaced and reported, the rest stays."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import orjson
import ormsgpack
import psycopg
import pytest
from langchain_core.messages import AIMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from pydantic import BaseModel

from checkpointer.errors import NonFiniteValueError, UnserializableValueError
from checkpointer.sanitize import (
    Change,
    dump_json,
    find_unserializable,
    is_inlinable,
    json_fallback,
    load_json,
    may_hold_non_finite,
    sanitize_for_json,
    sanitize_json_text,
    sanitize_value,
)

NAN = float("nan")
INF = math.inf

Point = namedtuple("Point", "x y")


class Score(NamedTuple):
    name: str
    value: float | None


class Ratio(float):
    """A float, but not exactly one."""


class Liar(float):
    """A float that is equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = float.__hash__


class Color(str, Enum):  # noqa: UP042 - as states have it; a StrEnum differs in str() only
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Plain(Enum):
    A = "a"


@dataclasses.dataclass
class Box:
    content: Any


class Model(BaseModel):
    x: float


class Refusing(dict[str, Any]):
    """A dict that takes no None after it was made."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise ValueError(key)


class Tags(list[Any]):
    """A list with something of its own."""

    owner: str | None = None


def named(value: Any) -> str:
    """Return a test's id, which must not need the digits of a huge integer."""
    return type(value).__name__


def deep(levels: int, inner: Any) -> Any:
    value = inner
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    return value


# --- sanitize_for_json and sanitize_value ---


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF, Ratio("nan"), np.float64("nan"), np.float32("inf")])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda v: v,
        lambda v: [v],
        lambda v: (1, v),
        lambda v: {"a": v},
        lambda v: {"a": [{"b": (v,)}]},
        lambda v: Point(v, 2),
        lambda v: deque([v], maxlen=3),
        lambda v: {v, 2},
        lambda v: frozenset({(v, 1)}),
        lambda v: OrderedDict(a=v),
        lambda v: defaultdict(list, a=v),
    ],
)
def test_a_non_finite_number_becomes_none_wherever_it_is(bad: Any, wrap: Any) -> None:
    assert sanitize_for_json(wrap(bad)) == wrap(None)


@pytest.mark.parametrize("bad", [np.float16("nan"), np.float16("-inf"), np.longdouble("inf")])
def test_every_width_of_numpy_scalar_is_seen_without_a_warning(bad: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sanitize_for_json([bad]) == [None]


def test_a_float_that_compares_as_it_likes_is_reported_for_what_it_is() -> None:
    assert sanitize_value([Liar("nan"), Liar(1)], "s", "null") == ([None, 1.0], [Change("s[0]", "nan")])
    assert sanitize_value([Liar("-inf")], "s", "null")[1] == [Change("s[0]", "-infinity")]


@pytest.mark.skipif(np.longdouble("1e4000") == INF, reason="long double is a double here")
def test_a_long_double_beyond_the_range_of_float_is_finite() -> None:
    value = [np.longdouble("1e4000")]
    assert sanitize_for_json(value) is value


@pytest.mark.parametrize(
    "value",
    [
        np.array([NAN]),
        Box(NAN),
        Model(x=NAN),
        Decimal("NaN"),
        AIMessage("x", additional_kwargs={"logprob": NAN}),
        complex(NAN, 0),
        np.complex64(NAN),
        b"\xcb\x7f\xf8",
        "NaN",
        object(),
        {NAN: 1, (NAN,): 2, np.float32("inf"): 3},
    ],
    ids=named,
)
def test_other_objects_and_keys_are_not_touched(value: Any) -> None:
    inside = [value]
    assert sanitize_for_json(inside) is inside
    assert sanitize_for_json([value, NAN])[0] is value


def test_what_has_no_change_is_shared_and_the_input_stays_as_it_was() -> None:
    clean, dirty = {"a": [1, 2]}, {"b": [NAN]}
    value = {"clean": clean, "dirty": dirty}
    result = sanitize_for_json(value)
    assert result == {"clean": {"a": [1, 2]}, "dirty": {"b": [None]}}
    assert result["clean"] is clean
    assert value["dirty"] is dirty
    assert math.isnan(dirty["b"][0])


def test_containers_keep_their_types_and_what_is_special_about_them() -> None:
    counted = defaultdict(list, a=NAN)
    tags = Tags([NAN])
    tags.owner = "me"
    result = sanitize_for_json(
        {
            "named": Score("a", NAN),
            "default": counted,
            "ordered": OrderedDict(z=1, a=NAN),
            "counter": Counter(a=NAN),
            "queue": deque([1, NAN], maxlen=2),
            "tags": tags,
        }
    )
    assert type(result["named"]) is Score
    assert result["named"] == Score("a", None)
    assert result["default"].default_factory is list
    assert list(result["ordered"].items()) == [("z", 1), ("a", None)]
    assert type(result["counter"]) is Counter
    assert (result["queue"].maxlen, list(result["queue"])) == (2, [1, None])
    assert (type(result["tags"]), result["tags"], result["tags"].owner) == (Tags, [None], "me")
    assert math.isnan(counted["a"])
    assert math.isnan(tags[0])


def test_a_container_that_refuses_the_change_becomes_a_plain_one() -> None:
    value = Refusing(a=NAN, b=1)
    assert sanitize_for_json([value]) == [{"a": None, "b": 1}]
    assert math.isnan(value["a"])
    plain = sanitize_for_json(time.struct_time((NAN, 1, 1, 0, 0, 0, 0, 1, 0)))  # type: ignore[arg-type]
    assert plain[0] is None


@pytest.mark.parametrize("levels", [5_000, 100_000])
def test_deep_nesting_is_walked_without_recursion(levels: int) -> None:
    clean = deep(levels, 1.0)
    assert sanitize_for_json(clean) is clean
    result, changes = sanitize_value(deep(levels, [NAN]), "s", "null")
    for level in reversed(range(levels)):
        result = result["a"] if level % 2 else result[0]
    assert result == [None]
    assert [change.kind for change in changes] == ["nan"]
    assert len(changes[0].path) < 300


def test_a_value_that_contains_itself_comes_back_as_it_is() -> None:
    ring: list[Any] = [NAN, {}]
    ring[1]["ring"] = ring
    assert sanitize_for_json(ring) is ring
    harmless: list[Any] = [1]
    harmless.append(harmless)
    assert sanitize_for_json(harmless) is harmless


def test_an_object_that_is_there_many_times_is_done_once() -> None:
    value: list[Any] = [NAN]
    for _ in range(60):  # 2**60 ways lead to the number
        value = [value, value]
    result, changes = sanitize_value(value, "s", "null")
    assert result[0] is result[1]
    assert len(changes) == 1


def test_changes_are_reported_by_path_and_kind() -> None:
    value = {
        "scores": [1, 2, 3, {"x": NAN}],
        "two words": INF,
        7: -INF,
        "set": {NAN},
        "point": Score("a", np.float32("nan")),
        "a\0b": (NAN,),
    }
    _, changes = sanitize_value(value, "channel_values", "null")
    assert changes == [
        Change("channel_values.scores[3].x", "nan"),
        Change('channel_values["two words"]', "infinity"),
        Change("channel_values[7]", "-infinity"),
        Change("channel_values.set{}", "nan"),
        Change("channel_values.point.value", "nan"),
        Change('channel_values["a\\u0000b"][0]', "nan"),
    ]
    assert sanitize_value({"a": NAN}, "", "null")[1] == [Change("a", "nan")]
    assert sanitize_value(NAN, "channel_values.x", "null") == (None, [Change("channel_values.x", "nan")])


def test_keep_changes_nothing() -> None:
    value = [NAN, {"a": INF}]
    assert sanitize_value(value, "s", "keep") == (value, [])
    assert sanitize_value(value, "s", "keep")[0] is value


@pytest.mark.parametrize("value", [{"a": [1, NAN]}, {"a": deque([1, Ratio("inf")])}])
def test_raise_names_the_path(value: Any) -> None:
    with pytest.raises(NonFiniteValueError, match=r"state\.a\[1\] is (NaN|Infinity)"):
        sanitize_value(value, "state", "raise")
    assert sanitize_value([1.0], "state", "raise") == ([1.0], [])


def test_numpy_is_not_imported() -> None:
    code = (
        "import sys; from checkpointer.sanitize import sanitize_for_json, dump_json;"
        "assert sanitize_for_json([float('nan'), 1j]) == [None, 1j]; dump_json([1, (2,)], '', 'null');"
        "sys.exit('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- may_hold_non_finite ---


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF, float(np.uint64(0x7FF0000000000001).view("f8"))])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda v: v,
        lambda v: [v],
        lambda v: (v, 1),
        lambda v: {"a": {v}},
        lambda v: [deque([frozenset({(v,)})])],
        lambda v: Point(1, Point(v, 2)),
        lambda v: OrderedDict(a=v),
        lambda v: ["x" * 300, *range(70_000), v],
    ],
)
def test_the_search_finds_what_the_serializer_wrote(bad: float, wrap: Any) -> None:
    kind, data = JsonPlusSerializer().dumps_typed(wrap(bad))
    assert kind == "msgpack"
    assert may_hold_non_finite(data)


def test_the_search_is_quiet_about_ordinary_values() -> None:
    value = {"a": [1.5, -0.0, 1e300, 5e-324], "text": "NaN Ë ϋ", "n": [2**64 - 1, -(2**63)]}
    assert not may_hold_non_finite(JsonPlusSerializer().dumps_typed(value)[1])


def test_the_serializer_has_no_other_way_to_write_a_float() -> None:
    """The search relies on this: floats take nine bytes; subclasses, NumPy's scalars too, are refused."""
    assert ormsgpack.packb(0.5) == b"\xcb\x3f\xe0" + bytes(6)
    for value in (
        Ratio("nan"),
        np.float64("nan"),
        np.float32("nan"),
        np.float16("nan"),
        np.longdouble("nan"),
    ):
        with pytest.raises(TypeError, match="not msgpack serializable"):
            JsonPlusSerializer().dumps_typed([value])


@pytest.mark.parametrize(
    ("data", "floor"),
    [
        (b"The quick brown fox jumps over the lazy dog. " * 50_000, 300),
        (b"\xcb" * 2_000_000, 10),
        (b"\xcb\x7f" * 1_000_000, 10),
        (ormsgpack.packb([1e307] * 200_000), 10),
    ],
    ids=["text", "cb", "cb7f", "large floats"],
)
def test_the_search_is_fast_and_stays_so_on_the_worst_input(data: bytes, floor: int) -> None:
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        assert not may_hold_non_finite(data)
        best = min(best, time.perf_counter() - start)
    assert len(data) / best / 1e6 > floor  # MB/s; several times less than what an idle machine reaches


# --- dump_json ---

CHECKPOINT = {
    "v": 4,
    "id": "1f0c9a7e-8b6e-6f0a-8001-3c5d9f2b7a11",
    "ts": "2026-11-24T07:45:00.123456+00:00",
    "channel_versions": {f"channel_{i}": f"{i:032}.0.{i * 7919:016}" for i in range(8)},
    "versions_seen": {f"node_{j}": {f"channel_{i}": f"{i:032}.0.{i * 7919:016}" for i in range(3)} for j in range(4)},
    "updated_channels": ["channel_1", "channel_2", "messages"],
    "channel_values": {"step": 3, "query": "hello world, how are you"},
}

ORDINARY: list[Any] = [
    CHECKPOINT,
    {"source": "loop", "step": 1, "parents": {}, "run_id": "r", "score": 0.25, "tuple": (1, (2, "x"))},
    {"color": Color.RED, "level": Level.HIGH, "np": np.float64(0.1), "r": Ratio(2.5), "p": Point(1, 2)},
    {1: "a", 1.5: "b", False: "c", None: "d", Color.RED: "e", Level.HIGH: "f", 1e16: "g", NAN: "h", INF: ""},
    {"n": [2**64, -(2**63) - 1, 10**400, -(10**40), 2**63, 2**64 - 1, -(2**63)]},
    {"f": [1e16, 1.5e300, -0.0, 1e-7, 5.0, 1e15, 9999999999999998.0, 5e-324, 1.7976931348623157e308, -1e22]},
    {"text": 'é 😀 \u2028 " \\ \\u0000 / \x01 \x7f', "esc\\u0000": "\ud83d\ude00"},
    OrderedDict(b=1, a=defaultdict(int, x=2)),
    {"1": "kept", 1: "wins"},
    [], {}, "", None, True, 0, 3.5, 1e16, "x",
]  # fmt: skip


@pytest.mark.parametrize("value", ORDINARY, ids=named)
def test_what_json_dumps_can_write_is_stored_the_same_and_read_the_same(value: Any, postgres_uri: str) -> None:
    text, changes = dump_json(value, "m", "null")
    assert changes == []
    with psycopg.connect(postgres_uri) as connection:
        row = connection.execute("SELECT %s::jsonb, %s::jsonb", (text.decode(), json.dumps(value))).fetchone()
    assert row is not None
    ours, stock = row
    assert exactly(ours) == exactly(stock)
    assert exactly(load_json(text)) == exactly(ours)
    assert exactly(json.loads(text)) == exactly(ours)


def exactly(value: Any) -> Any:
    """Return something that is equal only for the same types and bits, whatever the order of keys."""
    if isinstance(value, dict):
        return {key: exactly(child) for key, child in value.items()}
    if isinstance(value, list):
        return [exactly(child) for child in value]
    return type(value).__name__, repr(value)


def test_what_jsonb_cannot_hold_is_replaced_and_reported() -> None:
    value = {
        "a": [NAN, INF, -INF, np.float32("nan")],
        "nul": "x\0y\0",
        "k\0": 1,
        "s": "a\ud800b",
        "\udfff": "\0\udc00",
        "pair": "\ud83d\ude00",
    }
    text, changes = dump_json(value, "metadata", "null")
    assert json.loads(text) == {
        "a": [None, None, None, None],
        "nul": "xy",
        "k": 1,
        "s": "a\ufffdb",
        "\ufffd": "\ufffd",
        "pair": "😀",
    }
    assert sorted(changes, key=lambda change: change.path + change.kind) == [
        Change("metadata.a[0]", "nan"),
        Change("metadata.a[1]", "infinity"),
        Change("metadata.a[2]", "-infinity"),
        Change("metadata.a[3]", "nan"),
        Change("metadata.nul", "nul"),
        Change("metadata.s", "surrogate"),
        Change('metadata["\\udfff"]', "nul"),
        Change('metadata["\\udfff"]', "surrogate"),
        Change('metadata["\\udfff"]', "surrogate"),
        Change('metadata["k\\u0000"]', "nul"),
    ]


def test_keep_writes_null_too_since_json_has_no_such_number() -> None:
    assert dump_json([NAN], "m", "keep") == (b"[null]", [Change("m[0]", "nan")])
    with pytest.raises(NonFiniteValueError, match=r"m\.a\[0\] is -Infinity"):
        dump_json({"a": [-INF]}, "m", "raise")


@pytest.mark.parametrize(
    "odd",
    [
        {1},
        b"x",
        datetime.now(UTC),
        UUID(int=1),
        Decimal(1),
        Box(1),
        Plain.A,
        np.float32(1),
        np.int64(1),
        np.bool_(True),
        np.array([1]),
        orjson.Fragment(b"{"),
        object(),
        1j,
        10**5000,
        {(1,): 2},
        {b"x": 2},
    ],
    ids=named,
)
def test_what_json_dumps_refuses_is_refused_by_name_of_its_path(odd: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        json.dumps(odd)
    with pytest.raises(UnserializableValueError, match=r"^metadata\.a\[1\]"):
        dump_json({"a": [1, odd]}, "metadata", "null")


def test_what_is_too_deep_or_contains_itself_is_refused() -> None:
    ring: list[Any] = []
    ring.append([ring, ring])
    for value in (ring, deep(3_000, 1)):
        with pytest.raises(UnserializableValueError, match="nested"):
            dump_json(value, "metadata", "null")
    text, _ = dump_json(deep(400, 1), "metadata", "null")
    assert load_json(text) == deep(400, 1)


def test_a_typical_checkpoint_takes_microseconds() -> None:
    best = math.inf
    for _ in range(200):
        start = time.perf_counter()
        dump_json(CHECKPOINT, "checkpoint", "null")
        best = min(best, time.perf_counter() - start)
    assert best < 25e-6  # about 4 on an idle machine


# --- load_json ---


@pytest.mark.parametrize(
    "number",
    [2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63), -(2**63) - 1, 10**19, 10**30, 10**308, 10**309, 10**400],
)
def test_integers_of_any_size_are_decoded_exactly(number: int) -> None:
    for sign in (1, -1):
        text = f'{{"a": [[{sign * number}]]}}'.encode()
        assert exactly(load_json(text)) == exactly({"a": [[sign * number]]})
        assert exactly(load_json(memoryview(text))) == exactly({"a": [[sign * number]]})


def test_what_is_no_json_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        load_json(b"{")


# --- is_inlinable ---


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -5, 2**70, 10**4000, 1.5, -0.0, "", "x", "é😀", Color.RED, Level.HIGH, np.float64(1)],
    ids=named,
)
def test_scalars_that_jsonb_holds_are_inlinable(value: Any, postgres_uri: str) -> None:
    assert is_inlinable(value)
    with psycopg.connect(postgres_uri) as connection:
        connection.execute("SELECT %s::jsonb", (json.dumps(value),))


@pytest.mark.parametrize("value", [NAN, INF, Ratio("-inf"), "a\0", "é\0", "\ud800", "é\udfff", 10**5000], ids=named)
def test_scalars_that_jsonb_refuses_are_not_inlinable(value: Any, postgres_uri: str) -> None:
    assert not is_inlinable(value)
    with psycopg.connect(postgres_uri) as connection, pytest.raises((psycopg.DataError, ValueError)):
        connection.execute("SELECT %s::jsonb", (json.dumps(value),))


@pytest.mark.parametrize("value", [[], {}, (), b"x", np.float32(1), np.int64(1), Decimal(1), Plain.A, object()])
def test_what_is_no_scalar_is_not_inlinable(value: Any) -> None:
    assert not is_inlinable(value)


# --- sanitize_json_text ---


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "b": [1.50, "x"]}',
        b'{"a": "NaN", "NaN": "Infinity and -Infinity"}',
        rb'{"a": "\\u0000", "\\ud800": "\\\\u0000"}',
        rb'{"a": "\ud83d\ude00"}',
        '{"é": "😀"}'.encode(),
        b'{"a": "said \\"NaN, Infinity\\""}',
    ],
)
def test_harmless_text_comes_back_as_the_same_object(text: bytes) -> None:
    result, changes = sanitize_json_text(text)
    assert result is text
    assert changes == []


@pytest.mark.parametrize(
    ("text", "expected", "change"),
    [
        (b'{"a": [1, NaN]}', {"a": [1, None]}, Change("a[1]", "nan")),
        (b'{"NaN": Infinity}', {"NaN": None}, Change("NaN", "infinity")),
        (b"-Infinity", None, Change("", "-infinity")),
        (rb'{"a": "x\u0000y\\u0000"}', {"a": "xy\\u0000"}, Change("a", "nul")),
        (rb'{"a\\\u0000": 1}', {"a\\": 1}, Change('["a\\\\\\u0000"]', "nul")),
        (rb'["\ud800!"]', ["\ufffd!"], Change("[0]", "surrogate")),
        (rb'["\uDFFF"]', ["\ufffd"], Change("[0]", "surrogate")),
        (b'["\xff"]', ["\ufffd"], Change("[0]", "surrogate")),
    ],
)
def test_what_jsonb_would_refuse_in_a_text_is_replaced(
    text: bytes, expected: Any, change: Change, postgres_uri: str
) -> None:
    clean, changes = sanitize_json_text(text)
    assert changes == [change]
    with psycopg.connect(postgres_uri) as connection:
        assert connection.execute("SELECT convert_from(%s, 'UTF8')::jsonb", (clean,)).fetchone() == (expected,)
        with pytest.raises(psycopg.DataError):
            connection.execute("SELECT convert_from(%s, 'UTF8')::jsonb", (text,))


def test_a_damaged_text_is_an_error() -> None:
    for text in (b'{"a": NaN', rb'{"a": "\ud800'):
        with pytest.raises(UnserializableValueError, match="no JSON"):
            sanitize_json_text(text)


# --- json_fallback ---


@pytest.mark.parametrize(
    "value",
    [
        2**70,
        {"a": [2**64, -(2**63) - 1, 1.5, -0.0, 1e16, 1e-7, None, True, "é😀\0", {}]},
        {"": {"LC": 10**300}},
        deep(400, 2**80),
    ],
)
def test_large_integers_come_back_from_json_through_the_serializer(value: Any) -> None:
    text = json_fallback(value)
    assert text is not None
    assert exactly(JsonPlusSerializer().loads_typed(("json", text))) == exactly(value)


@pytest.mark.parametrize(
    "value",
    [
        (1,),
        {1},
        [b"x"],
        {1: 2},
        {Color.RED: 1},
        [Color.RED],
        [Level.HIGH],
        [NAN],
        [Ratio(1)],
        ["\ud800"],
        {"\ud800": 1},
        {"lc": 1, "type": "constructor", "id": []},
        [{"a": [{"lc": 2}]}],
        OrderedDict(a=1),
        [10**5000],
        Box(1),
        deep(5_000, 1),
    ],
    ids=named,
)
def test_what_would_not_come_back_equal_has_no_fallback(value: Any) -> None:
    assert json_fallback(value) is None


def test_a_value_that_contains_itself_has_no_fallback() -> None:
    ring: list[Any] = [2**70]
    ring.append(ring)
    assert json_fallback(ring) is None


# --- find_unserializable ---


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, 2, {"x": object()}]}, ".a[2].x"),
        ({"two words": (object(),)}, '["two words"][0]'),
        (["ok"] * 5_000 + [{"x": 1j}], "[5000].x"),
        ([Box({"y": Point(1, object())})], "[0].content.y.y"),
        ({"s": {1j}}, ".s{}"),
        ([{frozenset(): 1}], "[0][<frozenset>]"),
        ({"n": [2**70]}, ".n[0]"),
        ({"d": deque([1, np.float64(1)])}, ".d[1]"),
        (object(), ""),
    ],
)
def test_the_deepest_refused_part_is_named(value: Any, path: str) -> None:
    assert find_unserializable(value, JsonPlusSerializer().dumps_typed) == path


def test_the_search_for_the_refused_part_ends() -> None:
    ring: list[Any] = []
    ring.append({"again": ring})
    assert find_unserializable(ring, JsonPlusSerializer().dumps_typed) == "[0].again"
    calls = 0

    def refuse(_: Any) -> None:
        nonlocal calls
        calls += 1
        raise ValueError

    path = find_unserializable(deep(50_000, 1), refuse)
    assert calls < 2_100
    assert len(path) < 300
    assert find_unserializable([1, 2], lambda value: value) == ""
