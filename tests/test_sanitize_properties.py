"""The promises of sanitising, over generated values."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from checkpointer.errors import UnserializableValueError
from checkpointer.sanitize import (
    dump_json,
    json_fallback,
    load_json,
    may_hold_non_finite,
    sanitize_for_json,
    sanitize_json_text,
    sanitize_value,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Point = namedtuple("Point", "x y")

CONTAINERS = (dict, list, tuple, set, frozenset, deque)

any_text = st.text(st.characters(exclude_categories=()))  # NUL and surrogates too
floats = st.floats() | st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, 1e16, -0.0, 5e-324])
plain_scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | any_text | st.binary()
numpy_scalars = st.builds(np.float64, floats) | st.builds(
    lambda number, kind: kind(number), st.floats(width=16), st.sampled_from([np.float32, np.float16])
)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    hashable = st.recursive(
        leaves, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=3
    )
    keys = st.text(max_size=3) | st.integers(0, 9) | floats
    return st.recursive(
        hashable,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(keys, inner, max_size=4)
            | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
            | st.dictionaries(keys, inner, max_size=3).map(lambda made: defaultdict(list, made))
            | st.lists(inner, max_size=3).map(tuple)
            | st.builds(Point, inner, inner)
            | st.lists(inner, max_size=3).map(deque)
            | st.sets(hashable, max_size=3)
        ),
        max_leaves=12,
    )


states = nested(plain_scalars | floats)
states_with_numpy = nested(plain_scalars | floats | numpy_scalars)


def examples(number: int) -> settings:
    """So many examples, without limits of time, which a busy machine breaks; the connection can be shared by all."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, suppress_health_check=quiet)


def leaves_of(value: Any) -> Iterator[Any]:
    if isinstance(value, CONTAINERS):
        for child in value.values() if isinstance(value, dict) else value:
            yield from leaves_of(child)
    else:
        yield value


def is_non_finite(value: Any) -> bool:
    return isinstance(value, float | np.floating) and not math.isfinite(value)


def shape(value: Any) -> Any:
    """Return something equal only for the same types, the same order and the same objects at the leaves."""
    if isinstance(value, dict):
        return type(value), [(id(key), shape(child)) for key, child in value.items()]
    if isinstance(value, CONTAINERS):
        return type(value), [shape(child) for child in value]
    return id(value)


@given(states_with_numpy)
@examples(400)
def test_no_non_finite_number_is_reachable_afterwards_and_each_is_reported(value: Any) -> None:
    before = shape(value)
    bad = sum(map(is_non_finite, leaves_of(value)))
    result, changes = sanitize_value(value, "", "null")
    assert not any(map(is_non_finite, leaves_of(result)))
    assert shape(value) == before  # the input is not changed
    assert type(result) is type(value) or is_non_finite(value)
    assert (result is value) == (bad == 0)
    assert bool(changes) == (bad > 0)
    assert len(changes) <= bad  # a shared container counts once


@given(states_with_numpy)
@examples(300)
def test_a_second_time_changes_nothing(value: Any) -> None:
    once = sanitize_for_json(value)
    assert sanitize_for_json(once) is once


def described(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return the value's form, with what `leaf` makes of the rest."""
    if isinstance(value, dict):
        return [(id(key), described(child, leaf)) for key, child in value.items()]
    if isinstance(value, set | frozenset):
        # Of equal elements, such as (NaN, 1) and (NaN, True) when they have become (None, 1), any one stays.
        return type(value), sorted({repr(described(child, lambda inner: as_number(leaf(inner)))) for child in value})
    if isinstance(value, CONTAINERS):
        return type(value), [described(child, leaf) for child in value]
    return leaf(value)


def as_number(value: Any) -> Any:
    return None if value is None else float(value) + 0.0


@given(nested(st.booleans() | floats | numpy_scalars))
@examples(300)
def test_all_else_stays_where_it_was(value: Any) -> None:
    expected = described(value, lambda leaf: None if is_non_finite(leaf) else leaf)
    assert described(sanitize_for_json(value), lambda leaf: leaf) == expected


@given(states)
@examples(600)
def test_the_search_of_the_serialised_form_misses_nothing(value: Any) -> None:
    kind, data = JsonPlusSerializer().dumps_typed(value)
    assume(kind == "msgpack")
    if sanitize_for_json(value) is not value:
        assert may_hold_non_finite(data)


@given(states_with_numpy)
@examples(300)
def test_numpy_scalars_are_either_refused_by_the_serializer_or_found(value: Any) -> None:
    try:
        kind, data = JsonPlusSerializer().dumps_typed(value)
    except TypeError:
        return
    if kind == "msgpack" and sanitize_for_json(value) is not value:
        assert may_hold_non_finite(data)


def test_a_non_finite_number_is_found_at_every_offset_and_payload() -> None:
    dumps = JsonPlusSerializer().dumps_typed
    for bits in (0x7FF0000000000001, 0xFFF7FFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000):
        number = float(np.uint64(bits).view(np.float64))
        for length in range(70):
            assert may_hold_non_finite(dumps(["x" * length, number, length])[1])


# --- JSON ---

json_keys = any_text | st.integers() | floats | st.booleans() | st.none()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**40), 10**40) | floats | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_keys, inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=15,
)


@pytest.fixture
def connection(postgres_uri: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(postgres_uri, autocommit=True) as made:
        yield made


def jsonb(connection: psycopg.Connection[Any], text: str) -> Any:
    row = connection.execute("SELECT %s::jsonb", (text,)).fetchone()
    assert row is not None
    return row[0]


def exactly(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: exactly(child) for key, child in value.items()}
    if isinstance(value, list):
        return [exactly(child) for child in value]
    return type(value).__name__, repr(value)


@given(value=json_values)
@examples(500)
def test_jsonb_takes_the_text_and_gives_back_what_it_decodes_to(
    value: Any, connection: psycopg.Connection[Any]
) -> None:
    text, changes = dump_json(value, "m", "null")
    stored = jsonb(connection, text.decode())
    assert exactly(load_json(text)) == exactly(stored)
    try:
        stock = jsonb(connection, json.dumps(value))
    except psycopg.DataError:
        assert changes
    else:
        assert changes == []
        assert exactly(stored) == exactly(stock)


@given(value=json_values)
@examples(300)
def test_encoding_does_not_change_the_value(value: Any) -> None:
    before = shape(value)
    dump_json(value, "m", "null")
    assert shape(value) == before


@given(value=states_with_numpy)
@examples(300)
def test_what_is_refused_is_what_json_dumps_refuses(value: Any) -> None:
    try:
        json.dumps(sanitize_for_json(value))
    except TypeError:
        with pytest.raises(UnserializableValueError):
            dump_json(value, "m", "null")
    else:
        dump_json(value, "m", "null")


@given(value=json_values, ascii_only=st.booleans())
@examples(500)
def test_the_second_pass_makes_any_json_acceptable_and_leaves_acceptable_json_alone(
    value: Any, ascii_only: bool, connection: psycopg.Connection[Any]
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    clean, changes = sanitize_json_text(text)
    stored = jsonb(connection, clean.decode())
    try:
        expected = jsonb(connection, text.decode())
    except (psycopg.DataError, UnicodeDecodeError):
        assert changes
    else:
        assert clean is text
        assert exactly(stored) == exactly(expected)
    assert sanitize_json_text(clean)[0] is clean


@given(value=json_values)
@examples(300)
def test_what_was_made_for_jsonb_passes_the_second_time_unchanged(value: Any) -> None:
    text, _ = dump_json(value, "m", "null")
    assert sanitize_json_text(text)[0] is text


@given(value=json_values)
@examples(400)
def test_a_fallback_text_reads_back_equal_through_the_serializer(value: Any) -> None:
    text = json_fallback(copy.deepcopy(value))
    if text is not None:
        assert exactly(JsonPlusSerializer().loads_typed(("json", text))) == exactly(value)
