"""The document of events lists what the code emits, no more and no less."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from checkpointer.events import SEVERITIES, CheckpointEvent, Outcome
from observability.projections import user_view

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"[a-z_]+\.[a-z_]+")
# The functions that make events; their fields are constants where the event is always the same.
MAKERS = {"CheckpointEvent", "event", "_tell", "_resolved", "_say"}


def emitted() -> list[tuple[str, dict[str, Any]]]:
    """Return the name of each event that is made in the source, with those of its fields that are constants there."""
    found = []
    for package in ("checkpointer", "observability"):
        for path in (ROOT / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if not isinstance(call, ast.Call):
                    continue
                maker = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                given = {word.arg: word.value for word in call.keywords}
                constants = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
                fields = {
                    name: node.value for name, node in given.items() if name and isinstance(node, ast.Constant)
                } | ({"severity": constants[1]} if maker in {"event", "_tell"} and len(constants) > 1 else {})
                name = fields.pop("name", constants[0] if constants else None)
                if maker in MAKERS and isinstance(name, str) and NAME.fullmatch(name):
                    found.append((name, fields))
    return found


def documented() -> dict[str, dict[str, Any]]:
    """Return the example of each event in the document."""
    text = (ROOT / "docs" / "events.md").read_text()
    sections = re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: json.loads(re.findall(r"```json\n(.*?)```", section, re.DOTALL)[0]) for name, section in sections}


def test_every_event_that_is_emitted_is_documented_and_no_other() -> None:
    assert {name for name, _ in emitted()} == set(documented())


@pytest.mark.parametrize("name", documented())
def test_an_example_is_an_event_as_the_code_makes_it(name: str) -> None:
    example = documented()[name]
    event = CheckpointEvent(**example)
    assert event.name == name
    assert event.severity in SEVERITIES
    assert event.outcome in (None, *get_args(Outcome))
    assert (event.error_type is None) == (event.severity == "info")
    compared = ("severity", "error_type", "outcome", "component", "operation", "user_notice")
    made = [{key: fields[key] for key in compared if key in fields} for one, fields in emitted() if one == name]
    assert any(fields.items() <= example.items() for fields in made)


def test_whoever_is_told_gets_a_sentence_of_its_own() -> None:
    unknown = {
        user_view(CheckpointEvent(name="x.y", severity=severity, message=""))["message"] for severity in SEVERITIES
    }
    for name, example in documented().items():
        if example.get("user_notice"):
            assert user_view(CheckpointEvent(**example))["message"] not in unknown, name
