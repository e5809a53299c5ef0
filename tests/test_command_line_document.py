"""The document of the command line lists the commands and options that there are, no more and no less."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command_line import tree

TEXT = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()
COMMANDS = tree()
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*|(?<=`)-[a-z](?=`)")
TYPED = re.compile(r"(?:^\$ |`)(checkpointer [^`\n]+)", re.MULTILINE)


def sections() -> dict[str, str]:
    found = re.findall(r"^### checkpointer ([^\n]+)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return dict(found)


def common() -> set[str]:
    part = TEXT.partition("## What all commands have in common")[2].partition("| exit code")[0]
    return set(re.findall(r"^\| `(--[a-z-]+)`", part, re.MULTILINE))


def options(name: str) -> set[str]:
    given = [param for param in COMMANDS[name].params if param.param_type_name == "option"]
    return {opt for param in given for opt in (*param.opts, *param.secondary_opts)} | {"--help"}


def test_every_command_has_a_section_and_no_other() -> None:
    assert sections().keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_describes_the_options_of_its_command_and_no_other(name: str) -> None:
    rows = set(OPTION.findall("\n".join(re.findall(r"^\| (`-.+?) \|", sections()[name], re.MULTILINE))))
    assert rows == options(name) - common()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_shows_its_command(name: str) -> None:
    assert f"checkpointer {name}" in "\n".join(TYPED.findall(sections()[name]))


def test_the_options_in_common_are_those_of_several_commands() -> None:
    assert common() == {"--postgres-uri", "--redis-url", "--schema", "--prefix", "--json", "--help"}
    for option in common():
        assert sum(option in options(name) for name in COMMANDS) > 5


def typed() -> list[str]:
    return [line.partition(" | ")[0] for line in TYPED.findall(TEXT)]


@pytest.mark.parametrize("line", typed())
def test_whatever_is_shown_being_typed_can_be_typed(line: str) -> None:
    words = shlex.split(line)[1:]
    if not words[0].startswith("--"):
        name = next(one for one in (" ".join(words[:2]), words[0]) if one in COMMANDS)
        assert {word for word in words if word.startswith("--")} <= options(name)


def test_the_exit_codes_are_those_of_the_code() -> None:
    assert re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE) == ["0", "1", "2", "130"]
