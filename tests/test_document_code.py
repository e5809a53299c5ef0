"""Every code block of README, docs and the other documents is executed, each document from its first line to its last.

A document has a database and a Redis of its own and one namespace of Python, so a later block sees what an earlier one
has made. What each language is put to stands in `LANGUAGES`; a language that is not there fails, so that none is
forgotten. Commands of this project are run, if they end by themselves, else they are parsed as far as the command line
does it itself; of other programs only a list is known.

Two marks, each an HTML comment before a block, say what the reader is expected to have: `given: graph` names of the
table `GIVEN`, and `proved by: tests/test_x.py` that another test executes the block. Of `saver`, `builder`, `graph` and
`config`, which mean the same everywhere, no mark is needed.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import configparser
import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from urllib.parse import quote
from uuid import uuid4

import psycopg
import pytest
import redis
import yaml
from command_line import command
from documents import ROOT, Block, blocks, count_of_marks, documents, name_of
from helpers import with_database
from langgraph.graph import START, MessagesState, StateGraph
from typer.main import get_command

from checkpointer import BufferedPostgresSaver, cli, embedded
from observability.alerts import Alerts
from observability.api import create_app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# What stands for a value that only the reader knows, in commands.
VALUES = {"ID": "1", "TOKEN": "cpt_token", "ADMIN": "cpt_token", "THREAD": "chat-1", "URL": "http://localhost:8080"}
# Commands that do not end by themselves, and options that make one so.
ENDLESS = {"worker", "serve", "demo", "tail"}
FOLLOWING = {"--follow", "-f", "--watch"}
# Programs of others, which are neither run nor checked.
PROGRAMS = {
    *("apt-get", "cd", "docker", "export", "git", "kill", "mkdocs", "mypy", "openssl", "pg_dump", "redis-cli"),
    *("ruff", "lint-imports", "set", "systemctl", "echo", "sudo", "jq", ".", "xargs"),
}
SHELL_WORDS = {"&&", "||", ";", "|", "&", "\n"}


@pytest.fixture(scope="module")
def own_pair() -> Iterator[embedded.Servers]:
    """Servers of the documents' own, since examples use the default prefix."""
    with embedded.servers() as pair:
        yield pair


class Reader:
    """Somebody who goes through a document and does what it says."""

    def __init__(self, postgres_uri: str, redis_url: str) -> None:
        self.postgres_uri, self.redis_url = postgres_uri, redis_url
        self.names: dict[str, Any] = {"__name__": "__main__", "POSTGRES_URI": postgres_uri, "REDIS_URL": redis_url}
        self.environment = {
            "POSTGRES_URI": postgres_uri,
            "REDIS_URL": redis_url,
            # Where nobody listens.
            "CHECKPOINTER_ALERT_WEBHOOK": "http://127.0.0.1:9/",
            "CHECKPOINTER_ALERT_WEBHOOK_SECRET": "a secret",
            "CHECKPOINTER_ALERT_APPRISE": "json://127.0.0.1:9/",
            "LANGGRAPH_AES_KEY": "0123456789abcdef",
        }
        self.stack = ExitStack()
        self.runner = asyncio.Runner()

    def __enter__(self) -> Reader:
        others = {name: value for name, value in os.environ.items() if not name.startswith("CHECKPOINTER_")}
        spool = {"CHECKPOINTER_SPOOL_DIR": os.environ["CHECKPOINTER_SPOOL_DIR"]}
        self.stack.enter_context(patch.dict(os.environ, others | spool | self.environment, clear=True))
        return self

    def __exit__(self, *_: object) -> None:
        for value in list(self.names.values()):
            if isinstance(value, BufferedPostgresSaver):
                self.runner.run(value.aclose())
            elif isinstance(value, Alerts):
                value.close()
        self.stack.close()
        self.runner.close()

    def prepare(self) -> None:
        """Make the tables, as an application that has run once."""
        with BufferedPostgresSaver.from_conn_string(self.postgres_uri, redis_url=self.redis_url) as saver:
            saver.setup()

    def give(self, names: tuple[str, ...]) -> None:
        for name in names:
            assert name in GIVEN, f"the document says that {name!r} is given, which is unknown here"
            if name not in self.names or _is_closed(self.names[name]):
                self.names[name] = GIVEN[name](self)

    # Python.

    def python(self, block: Block) -> None:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(_at(block), str(block.document), "exec", flags=flags, dont_inherit=True)
        self.give(tuple(name for name in EVERYWHERE if name in code.co_names))
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if code.co_flags & inspect.CO_COROUTINE:
                self.runner.run(eval(code, self.names))
            else:
                exec(code, self.names)
        promised = re.findall(r"^ *print\(.*\)(?:  |\n *)# (.*)$", block.code, re.MULTILINE)
        assert [line for line in said.getvalue().splitlines() if line in promised] == promised, said.getvalue()

    def both_sides(self, block: Block) -> None:
        for sign in "-+":
            lines = [line for line in block.code.splitlines() if line[:1] in (sign, " ", "")]
            side = "\n".join(line[1:] for line in lines)
            self.python(Block(block.document, block.line, "python", side))

    # SQL.

    def sql(self, block: Block) -> None:
        with psycopg.connect(self.postgres_uri, autocommit=True) as conn:
            conn.execute(block.code.encode())

    # Shell.

    def shell(self, block: Block) -> None:
        for words in commands(block.code):
            self.run(words)

    def console(self, block: Block) -> None:
        typed = re.findall(r"^\$ ((?:.*\\\n)*.*)$", block.code, re.MULTILINE)
        assert typed, "a console block shows what was typed after a dollar sign"
        for text in typed:
            self.shell(Block(block.document, block.line, "sh", text))

    def run(self, words: list[str]) -> None:
        environment = dict(self.environment)
        while words and re.match(r"[A-Z][A-Z0-9_]*=", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if not words:
            return
        program, *arguments = words
        program = program.removeprefix(".venv/bin/").removeprefix("/usr/bin/")
        if program == "checkpointer":
            self.checkpointer(arguments, environment)
        elif re.fullmatch(r"python[\d.]*", program):
            self.interpreter(arguments)
        elif program in ("pip", "uv"):
            known_extras(arguments)
        elif program == "psql":
            done = subprocess.run(["psql", *arguments, "-v", "ON_ERROR_STOP=1"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif program == "curl":
            known_route(arguments)
        elif (ROOT / program).is_file():
            assert os.access(ROOT / program, os.X_OK), f"{program} cannot be executed"
        else:
            assert program in PROGRAMS, f"{program!r} is no program that this test knows"

    def checkpointer(self, arguments: list[str], environment: dict[str, str]) -> None:
        parse(arguments)
        if ENDLESS & set(arguments[:2]) or FOLLOWING & set(arguments):
            return
        done = command(*arguments, **environment)
        # Numbers and ids of examples are those of another database; the doctor judges the machine.
        assert done.code == 0 or done.err.startswith("There is no ") or arguments[0] == "doctor", done

    def interpreter(self, arguments: list[str]) -> None:
        if arguments[:1] == ["-c"]:
            # Nobody is there to press Enter.
            with contextlib.redirect_stdout(io.StringIO()), patch.object(builtins, "input", return_value=""):
                exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
        elif arguments[:1] == ["-m"]:
            module, rest = arguments[1], arguments[2:]
            assert importlib.util.find_spec(module), f"there is no module {module}"
            if module in ("benchmarks", *(f"benchmarks.{name}" for name in ("soak", "where", "hooks"))):
                known_options(("-m", module), rest)
            elif module == "pip":
                known_extras(rest)
        else:
            assert (ROOT / arguments[0]).is_file(), f"there is no file {arguments[0]}"
            if arguments[1:]:
                known_options((str(ROOT / arguments[0]),), arguments[1:])


def _at(block: Block) -> str:
    """Return the code of a block so that a traceback shows the document's own line."""
    return "\n" * (block.line - 1) + textwrap.dedent(block.code)


def commands(text: str) -> Iterator[list[str]]:
    """Split what is typed in a shell into commands, with values for variables, and without redirections."""
    text = text.replace("\\\n", " ")
    for inner in re.findall(r"\$\(([^()]*)\)", text):
        yield from commands(inner)
    text = re.sub(r"\$\([^()]*\)", "1", text)
    text = re.sub(r"\$\{?([A-Z_]+)\}?", lambda found: VALUES.get(found[1]) or os.environ.get(found[1], "1"), text)
    for line in _lines(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;><")
        lexer.whitespace_split = True
        words: list[str] = []
        redirected = False
        for word in lexer:
            if word in SHELL_WORDS:
                if words:
                    yield words
                words = []
            elif word in (">", ">>", "<", ">&"):
                redirected = True
            elif redirected:
                redirected = False
            else:
                words.append(word)
        if words:
            yield words


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a script; one that ends inside quotation marks goes on in the next."""
    held = ""
    for line in text.splitlines():
        held = f"{held}\n{line}" if held else line
        try:
            shlex.split(held, comments=True)
        except ValueError:
            continue
        yield held
        held = ""
    assert not held, f"a quotation mark is not closed: {held}"


@cache
def _command_tree() -> Any:
    return get_command(cli._app())


def parse(arguments: list[str]) -> None:
    """Have the command line parse a command, without doing it."""
    tree, parent, rest, name = _command_tree(), None, arguments, "checkpointer"
    while True:
        context = tree.make_context(name, list(rest), parent=parent)
        if not hasattr(tree, "resolve_command"):
            return
        left = [*getattr(context, "_protected_args", ()), *context.args]
        if not left:
            return
        name, tree, rest = tree.resolve_command(context, left)
        parent = context


@cache
def _extras() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def known_extras(arguments: list[str]) -> None:
    """Assert that what pip is told to install is there."""
    for word in arguments:
        found = re.fullmatch(r"(langgraph-checkpoint-buffered|\.)(?:\[(.*)\])?(?:[=<>~].*)?", word)
        if found:
            assert set((found[2] or "").split(",")) <= _extras().keys(), word
        elif word.startswith("langgraph"):
            wanted = {re.split(r"[\[<>=]", line)[0] for lines in _extras().values() for line in lines}
            assert word in wanted, f"{word} is neither this package nor one that it uses"


@cache
def _help(program: tuple[str, ...]) -> str:
    done = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout


def known_options(program: tuple[str, ...], arguments: list[str]) -> None:
    """Assert that a Python program has the options that are given to it."""
    for word in arguments:
        if word.startswith("--"):
            name = word.partition("=")[0]
            assert re.search(rf"{name}\b", _help(program)), f"{program[-1]} has no option {name}"


@cache
def _routes() -> list[tuple[str, re.Pattern[str]]]:
    paths = create_app(postgres_uri="postgresql://x/y").openapi()["paths"] | {"/openapi.json": {"get": {}}}
    return [
        (method.upper(), re.compile(re.sub(r"\{\w+\}", ".+", path)))
        for path, methods in paths.items()
        for method in methods
    ]


def known_route(arguments: list[str]) -> None:
    """Assert that what curl asks for is a route."""
    method = arguments[arguments.index("-X") + 1] if "-X" in arguments else "GET"
    (url,) = [word for word in arguments if re.match(r"(https?://)?localhost", word)]
    path = re.sub(r"^(https?://)?localhost(:\d+)?", "", url).partition("?")[0]
    assert any(verb == method and pattern.fullmatch(path) for verb, pattern in _routes()), f"{method} {path}"


# What may be given.


def _builder(_: Reader) -> Any:
    builder = StateGraph(MessagesState)
    builder.add_node("answer", lambda state: {"messages": [("ai", f"You said: {state['messages'][-1].content}")]})
    builder.add_edge(START, "answer")
    return builder


def _saver(reader: Reader) -> BufferedPostgresSaver:
    saver = reader.stack.enter_context(
        BufferedPostgresSaver.from_conn_string(reader.postgres_uri, redis_url=reader.redis_url)
    )
    saver.setup()
    return saver


def _graph(reader: Reader) -> Any:
    reader.give(("saver", "builder"))
    return reader.names["builder"].compile(checkpointer=reader.names["saver"])


def _citus(reader: Reader) -> None:
    """Stand in for the extension: tables and columns are looked for, and nothing is distributed."""
    with psycopg.connect(reader.postgres_uri, autocommit=True) as conn:
        conn.execute("""
            CREATE FUNCTION create_distributed_table(name regclass, col text, colocate_with text DEFAULT 'default')
            RETURNS void LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM FROM pg_attribute WHERE attrelid = name AND attname = col;
                ASSERT found, 'no such column';
                ASSERT colocate_with = 'default' OR to_regclass(colocate_with) IS NOT NULL, 'no such table';
            END $$""")


def _is_closed(value: Any) -> bool:
    """Whether it is a saver whose `with` block has ended, or a graph over one."""
    saver = getattr(value, "checkpointer", value)
    return isinstance(saver, BufferedPostgresSaver) and saver._core._closed


EVERYWHERE = ("saver", "builder", "graph", "config")
GIVEN: dict[str, Callable[[Reader], Any]] = {
    "builder": _builder,
    "saver": _saver,
    "graph": _graph,
    "config": lambda _: {"configurable": {"thread_id": "chat-1"}},
    "inputs": lambda _: {"messages": [("user", "Hello")]},
    "citus": _citus,
}


# What is done with each language.


def _json(_: Reader, block: Block) -> None:
    """One value, or one on each line; what differs from run to run may stand there as <name>."""
    text = re.sub(r"(?<=: )<\w+>", "0", block.code)
    try:
        json.loads(text)
    except json.JSONDecodeError:
        assert [json.loads(line) for line in text.splitlines()]


def _yaml(_: Reader, block: Block) -> None:
    assert list(yaml.safe_load_all(block.code)) != [None]


def _ini(_: Reader, block: Block) -> None:
    parser = configparser.ConfigParser(allow_no_value=True)
    parser.read_string(block.code)
    assert parser.sections()


def _browser(_: Reader, block: Block) -> None:
    """Let a browser compile it."""
    script = f"try {{ new Function({json.dumps(block.code)}); document.title = 'it is well' }} catch {{}}"
    page = f"<script>{script}</script>"
    chromium = shutil.which("chromium")
    assert chromium, "Debian's package chromium is needed"
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"data:text/html,{quote(page)}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "<title>it is well</title>" in done.stdout, done.stdout


def _nothing(_: Reader, block: Block) -> None:
    """Text is for people."""
    assert block.code.strip()


def _json(_: Reader, block: Block) -> None:
    """Read one document, or one on each line."""
    try:
        json.loads(block.code)
    except json.JSONDecodeError:
        for line in block.code.splitlines():
            json.loads(line)


LANGUAGES: dict[str, Callable[[Reader, Block], None]] = {
    "python": Reader.python,
    "diff": Reader.both_sides,
    "sql": Reader.sql,
    "sh": Reader.shell,
    "bash": Reader.shell,
    "console": Reader.console,
    "json": _json,
    "toml": lambda _, block: tomllib.loads(block.code),
    "yaml": _yaml,
    "ini": _ini,
    "js": _browser,
    "text": _nothing,
}


@contextlib.contextmanager
def new_reader(pair: embedded.Servers) -> Iterator[Reader]:
    """A reader with an empty Redis and a database in which there is nothing but the tables."""
    with redis.Redis.from_url(pair.redis_url) as client:
        client.flushall()
    name = f"document_{uuid4().hex}"
    with psycopg.connect(pair.postgres_uri, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
        with Reader(with_database(pair.postgres_uri, name), pair.redis_url) as found:
            found.prepare()
            yield found
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def reader(own_pair: embedded.Servers) -> Iterator[Reader]:
    with new_reader(own_pair) as found:
        yield found


@pytest.fixture(scope="module")
def careless_reader(own_pair: embedded.Servers) -> Iterator[Reader]:
    with new_reader(own_pair) as found:
        yield found


def execute(block: Block, reader: Reader) -> None:
    """Do with a block what its language asks for."""
    assert block.language in LANGUAGES, f"{block.place}: no test knows the language {block.language!r}"
    if block.proved_by is not None:
        test = ROOT / block.proved_by
        assert block.document.name in test.read_text(), f"{block.place}: {block.proved_by} does not read it"
        return
    try:
        reader.give(block.given)
        LANGUAGES[block.language](reader, block)
    except BaseException as exc:
        exc.add_note(f"This was in {block.place}.")
        raise


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_all_that_a_document_shows_works(document: Path, reader: Reader) -> None:
    for block in blocks(document):
        execute(block, reader)


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "saver.flushh()"),
        ("python", "assert not await saver.aflush()"),
        ("python", "print(1 + 1)  # 3"),
        ("diff", "-import psycopg\n+import psycopgg\n print(POSTGRES_URI)"),
        ("diff", "-import psycopgg\n+import psycopg\n print(POSTGRES_URI)"),
        ("sql", "SELECT error_typ FROM system_errors"),
        ("sh", "checkpointer error list"),
        ("sh", "checkpointer errors list --severe"),
        ("sh", "checkpointer errors list --severity loud"),
        ("sh", "checkpointer errors"),
        ("sh", "cd somewhere && checkpointer worker --htp 0.0.0.0:8081 &"),
        ("sh", "curl localhost:8080/admin/system-error | jq ."),
        ("sh", "curl -X POST localhost:8080/admin/system-errors"),
        ("sh", "pip install 'langgraph-checkpoint-buffered[cly]'"),
        ("sh", "pip install langgraph-checkpointer-buffered langgraph-checkpoint-buffred"),
        ("sh", "python examples/quickstrat.py"),
        ("sh", "python -m benchmarks --quickly"),
        ("sh", "python tests/faults/torture.py --hours 10"),
        ("sh", "python -c 'import checkpointers'"),
        ("sh", 'psql "$POSTGRES_URI" -c "SELECT error_typ FROM system_errors"'),
        ("sh", 'psql "$POSTGRES_URI" -f migrations/0001_bufer.sql'),
        ("sh", "chekpointer migrate"),
        ("console", "checkpointer migrate"),
        ("console", "$ checkpointer migrate\napplied\n$ checkpointer \\\n    migrat"),
        ("json", "{'a': 1}"),
        ("toml", "a = b"),
        ("yaml", "a: b: c"),
        ("ini", "ack = buffered"),
        ("js", "async function watch( { }"),
        ("rust", "fn main() {}"),
        ("", "checkpointer migrate"),
    ],
)
def test_a_mistake_in_a_block_is_found(language: str, code: str, careless_reader: Reader) -> None:
    with pytest.raises((Exception, SystemExit)):
        execute(Block(ROOT / "README.md", 1, language, code), careless_reader)


# Names of spans, which look like commands.
SPANS = {"checkpointer put", "checkpointer flush_in_background"}


def named_commands(text: str) -> list[str]:
    """Return the commands that stand in the text itself."""
    found = re.findall(r"(?<!`)`(checkpointer [^`\n]+)`", text)
    return [one for one in found if one not in SPANS and "<" not in one]


@pytest.mark.parametrize("path", [*documents(), *(ROOT / ".github").rglob("*.yml")], ids=name_of)
def test_a_command_that_the_text_names_is_there_with_its_options(path: Path) -> None:
    for text in named_commands(path.read_text()):
        node, words = _command_tree(), shlex.split(text)[1:]
        while words and hasattr(node, "commands") and not words[0].startswith("--"):
            assert words[0] in node.commands, text
            node = node.commands[words.pop(0)]
        names = {name for parameter in node.params for name in (*parameter.opts, *parameter.secondary_opts)}
        options = names | {"--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, text


FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


@pytest.mark.parametrize("path", FORMS, ids=name_of)
def test_a_form_for_issues_has_what_github_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form.keys() >= {"name", "description", "body"}
    assert form.keys() <= {"name", "description", "body", "title", "labels", "assignees", "projects", "type"}
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for field in form["body"]:
        attributes = field["attributes"]
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert "value" in attributes if field["type"] == "markdown" else attributes["label"]
        if field["type"] in ("dropdown", "checkboxes"):
            assert attributes["options"]
            assert all(isinstance(one, dict) == (field["type"] == "checkboxes") for one in attributes["options"])


def test_each_mark_stands_before_a_block() -> None:
    for document in documents():
        used = sum(bool(block.given) + bool(block.proved_by) for block in blocks(document))
        assert used == count_of_marks(document), name_of(document)


def test_names_that_are_given_hide_nothing_that_python_has() -> None:
    assert not [name for name in GIVEN if hasattr(builtins, name)]
