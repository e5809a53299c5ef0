"""Errors of one kind have one fingerprint, whatever thread, id, number, time or machine they name."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.events import CheckpointEvent, describe_error
from observability.errors.fingerprint import fingerprint, fingerprint_of, in_app_frames, normalize
from observability.projections import operator_view

FACTS: dict[str, Any] = {
    "error_type": "checkpoint_flush_error",
    "exception_type": "psycopg.errors.AdminShutdown",
    "component": "flusher",
    "operation": "flush",
    "error_code": "57P01",
    "message": "The flush failed.",
    "stack": 'Traceback (most recent call last):\n  File "/srv/app/shop/cart.py", line 10, in pay\n    x()\nE: x\n',
}


def test_a_fingerprint_names_its_version_and_stays_what_it_is() -> None:
    # Written down: groups in a database have it, so that it may only change with the version.
    assert fingerprint(**FACTS) == "v1:79cd12a5525e39dc873a3bc4705f082b"


@pytest.mark.parametrize("fact", FACTS)
def test_each_fact_makes_another_kind(fact: str) -> None:
    other = {**FACTS, fact: FACTS[fact].replace("pay", "refund") if fact == "stack" else "other"}
    assert fingerprint(**other) != fingerprint(**FACTS)


def test_facts_do_not_run_into_each_other() -> None:
    assert fingerprint(error_type="a", component="b") != fingerprint(error_type="ab")
    assert fingerprint(error_type="a", component="b") != fingerprint(error_type="a", operation="b")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Thread t-1 waits.", "Thread u-22 waits."),
        ("4 records wait since 12.5 s", "17 records wait since 0.1 s"),
        ("at 2026-01-02T03:04:05.678+00:00", "at 2027-11-12 13:14:15"),
        ("thread 'alice' is gone", "thread 'bob' is gone"),
        ('thread "alice" is gone', 'thread "a longer one" is gone'),
        ("can't read 'a'", "can't read 'b'"),
        ("task 0190a3b4-1111-7222-8333-444455556666", "task ffffffff-aaaa-7bbb-8ccc-ddddeeee1111"),
        ("object at 0x7f8ef99685e0", "object at 0x1"),
        ("db.internal:5432 refused", "10.0.0.1:5433 refused"),
        ("::1 refused", "fe80::1:2 refused"),
        ("GET https://a.example/x?y=1 failed", "GET http://b.example:8080/ failed"),
        ("cannot open /var/lib/x.db", "cannot open /srv/other/place.db"),
        ("mail to bob@example.com", "mail to al.ice@x.org"),
        ("steps 3, 4, 5 are lost", "steps 17 are lost"),
        ("line\nwith the value 3", "line\nand something else"),
        ("a  b", "a b"),
    ],
)
def test_messages_that_differ_in_ids_numbers_and_places_are_one_kind(one: str, other: str) -> None:
    assert normalize(one) == normalize(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The flush failed.", "The put failed."),
        ("Redis refused", "Postgres refused"),
        ("thread 'a' is gone", "thread 'a' is back"),
        ("std::vector failed", "std::string failed"),
    ],
)
def test_messages_that_say_something_else_are_of_another_kind(one: str, other: str) -> None:
    assert normalize(one) != normalize(other)


_ids = st.one_of(
    st.uuids().map(str),
    st.integers(0, 10**12).map(str),
    st.from_regex(r"(user|thread|run)-[a-z]{1,20}-\d{1,6}", fullmatch=True),
    # No digit in it: known from the row alone.
    st.from_regex(r"[a-z]{3,12}(_|-|@|:)[a-z]{3,12}", fullmatch=True),
)
_templates = st.sampled_from(
    [
        "Flushing thread {thread} failed after {seconds} s; {count} records of run {run} wait.",
        "thread {thread!r} ({run}): {count} of {count} lost at {when}",
        "{thread}: checkpoint {checkpoint} could not be written, attempt {count}",
        "request to https://db-{count}.example:{port}/{thread} timed out",
        "{count}, {count}, {count} of {thread} are missing\n{run} {when}",
    ]
)
_occurrences = st.fixed_dictionaries(
    {
        "thread": _ids,
        "run": _ids,
        "checkpoint": st.uuids().map(str),
        "count": st.integers(0, 10**9),
        "seconds": st.floats(0, 10**6, allow_nan=False).map(lambda value: f"{value:.3f}"),
        "port": st.integers(1, 65535),
        "when": st.datetimes().map(lambda moment: moment.isoformat()),
    }
)


def _row(template: str, facts: dict[str, Any]) -> dict[str, Any]:
    return operator_view(
        CheckpointEvent(
            name="flush.failed",
            severity="critical",
            error_type="checkpoint_flush_error",
            message=template.format(**facts),
            thread_id=facts["thread"],
            run_id=facts["run"],
            checkpoint_id=facts["checkpoint"],
        )
    )


@given(_templates, _occurrences, _occurrences)
def test_the_same_failure_on_another_thread_is_of_the_same_kind(
    template: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert fingerprint_of(_row(template, one)) == fingerprint_of(_row(template, other))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(st.none(), st.text(), st.integers(), st.lists(st.text()))
            for name in ("error_type", "component", "error_message", "stack_trace", "thread_id", "error_context")
        },
    )
)
def test_any_row_has_a_fingerprint_that_tells_nothing_and_depends_on_nothing_else(row: dict[str, Any]) -> None:
    found = fingerprint_of(row)
    assert found == fingerprint_of(dict(row))
    version, digest = found.split(":")
    assert version == "v1"
    UUID(hex=digest)


def test_hostile_messages_take_no_long_time() -> None:
    begun = time.process_time()
    for text in (
        "a.a-" * 1000,
        "'" * 4000,
        "1, " * 1300,
        "::" * 2000,
        "http://" * 600,
        "a@" * 2000,
        "./" * 2000,
        "\0" * 4000,
    ):
        normalize(text)
        in_app_frames(f'  File "{text}", line 1, in {text}\n' * 10)
    # It takes some tens of milliseconds; a pattern that goes wrong takes minutes.
    assert time.process_time() - begun < 20


def _fail(depth: int) -> None:
    if depth:
        _fail(depth - 1)
    raise ValueError(f"at {depth}")


def _stack(depth: int) -> str:
    try:
        _fail(depth)
    except ValueError as exc:
        return describe_error(exc).stack
    raise AssertionError("it did not raise")


def test_frames_are_those_of_the_application_without_their_lines() -> None:
    stack = """Traceback (most recent call last):
  File "/srv/releases/20260102/shop/main.py", line 3, in main
    run()
  File "/srv/venv/lib/python3.11/site-packages/langgraph/pregel.py", line 5, in invoke
    step()
  File "/srv/releases/20260102/shop/cart.py", line 10, in pay
    charge()
  File "/usr/lib/python3.11/json/__init__.py", line 300, in loads
    decode()
  File "<frozen importlib._bootstrap>", line 1, in load
ValueError: x
"""
    assert in_app_frames(stack) == ["shop.cart:pay", "shop.main:main"]
    moved = stack.replace("/srv/releases/20260102", "/home/bob/app").replace("line 10", "line 12")
    assert in_app_frames(moved) == in_app_frames(stack)
    assert in_app_frames(stack.replace("in pay", "in refund")) != in_app_frames(stack)


def test_the_depth_of_a_recursion_makes_no_other_kind() -> None:
    assert in_app_frames(_stack(1)) == in_app_frames(_stack(30)) != []
