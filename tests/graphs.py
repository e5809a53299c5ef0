"""Agent graphs, and scripts that run them, for any saver: the same script must have the same outcome under each.

A *script* is a generator that yields calls and receives what they return, so that one text serves both APIs. All values
are deterministic except ids, versions and times; `plain()` makes those comparable.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict
from uuid import UUID, uuid4

import numpy as np
import psycopg
from helpers import with_database
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.channels.delta import DeltaChannel
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, Interrupt, Overwrite, RetryPolicy, Send, interrupt
from pydantic import BaseModel

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.pregel import Pregel

MARKER = "marker-7f3a-in-plain-text"
"""Stands in a message or list of every graph's state, never in a string that is a channel's whole value."""


class Call(NamedTuple):
    """A call for the runner to make; its `a` twin if it is asynchronous."""

    target: Any
    method: str
    args: tuple[Any, ...]
    named: dict[str, Any]
    raises: type[Exception] | None = None


Script = "Generator[Call, Any, None]"


@dataclass
class Run:
    """Makes the calls of a script on one thread."""

    graph: Pregel
    thread_id: str
    durability: str
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = {
            "configurable": {"thread_id": self.thread_id, "tenant": "acme"},
            "metadata": {"user": "ada"},
        }

    def invoke(self, value: Any, config: RunnableConfig | None = None, raises: type[Exception] | None = None) -> Call:
        return Call(self.graph, "invoke", (value, config or self.config), {"durability": self.durability}, raises)

    def state(self, config: RunnableConfig | None = None) -> Call:
        return Call(self.graph, "get_state", (config or self.config,), {"subgraphs": True})

    def history(self, config: RunnableConfig | None = None) -> Call:
        return Call(self.graph, "get_state_history", (config or self.config,), {})

    def update(self, values: Any, *, as_node: str | None = None, config: RunnableConfig | None = None) -> Call:
        return Call(self.graph, "update_state", (config or self.config, values), {"as_node": as_node})


@dataclass(frozen=True)
class Scenario:
    """A graph and what is done with it.

    Attributes:
        build: Compiles the graph; whatever counts attempts starts at zero.
        script: What is done with it.
        namespaces: Namespaces that keep a history of their own.
    """

    build: Callable[[BaseCheckpointSaver[Any]], Pregel]
    script: Callable[[Run], Generator[Call, Any, None]]
    namespaces: tuple[str, ...] = ("",)


# -- an agent with tools -----------------------------------------------------------------------------------------


class ScriptedModel(BaseChatModel):
    """Asks for two tools after a human, and sums up after tools."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, **kwargs: Any) -> ScriptedModel:
        return self

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        if isinstance(messages[-1], HumanMessage):
            turn = len(messages)
            calls = [
                {"name": "add", "args": {"a": turn, "b": 3}, "id": f"add-{turn}", "type": "tool_call"},
                {"name": "shout", "args": {"text": messages[-1].content}, "id": f"shout-{turn}", "type": "tool_call"},
            ]
            reply = AIMessage(f"{MARKER} asks", tool_calls=calls)
        else:
            results = [m.content for m in messages if isinstance(m, ToolMessage)]
            reply = AIMessage(f"The tools say {results[-2:]}.")
        return ChatResult(generations=[ChatGeneration(message=reply)])


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def shout(text: str) -> str:
    """Say it louder."""
    return f"{text}!"


class Chat(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


def build_tool_agent(saver: BaseCheckpointSaver[Any]) -> Pregel:
    model = ScriptedModel().bind_tools([add, shout])
    builder = StateGraph(Chat)
    builder.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_node("tools", ToolNode([add, shout]))
    builder.add_edge(START, "model")
    builder.add_conditional_edges("model", tools_condition)
    builder.add_edge("tools", "model")
    return builder.compile(checkpointer=saver)


def run_tool_agent(run: Run) -> Generator[Call, Any, None]:
    for turn in ("hello", "again"):
        yield run.invoke({"messages": [HumanMessage(f"{turn} {MARKER}", id=turn)]})
        yield run.state()


# -- fan-out -----------------------------------------------------------------------------------------------------


class Notes(TypedDict, total=False):
    notes: Annotated[list[Any], operator.add]
    total: Annotated[int, operator.add]
    title: str


def note(text: str) -> Callable[[Any], dict[str, Any]]:
    """Return a node that notes its text and how much it has found."""

    def node(state: Any) -> dict[str, Any]:
        return {"notes": [f"{text} after {len(state.get('notes', ()))}"], "total": 1}

    return node


def build_fan_out(saver: BaseCheckpointSaver[Any]) -> Pregel:
    builder = StateGraph(Notes)
    builder.add_node("plan", note("plan"))
    builder.add_node("left", note("left"))
    builder.add_node("right", note("right"))
    builder.add_node("worker", lambda state: {"notes": [f"worker {state['n']} {MARKER}"], "total": state["n"]})
    builder.add_node("join", note("join"), defer=True)
    builder.add_edge(START, "plan")
    builder.add_conditional_edges(
        "plan",
        lambda state: ["left", "right", *(Send("worker", {"n": n, "notes": [MARKER]}) for n in range(3))],
        ["left", "right", "worker"],
    )
    for name in ("left", "right", "worker"):
        builder.add_edge(name, "join")
    return builder.compile(checkpointer=saver)


def run_fan_out(run: Run) -> Generator[Call, Any, None]:
    yield run.invoke({"notes": [MARKER], "title": "first"})
    yield run.invoke({"notes": ["more"], "title": "second"})


# -- subgraphs ---------------------------------------------------------------------------------------------------


def build_child(*names: str, **compiled: Any) -> Pregel:
    builder = StateGraph(Notes)
    builder.add_sequence([(name, note(name)) for name in names])
    builder.add_edge(START, names[0])
    return builder.compile(**compiled)


def build_subgraph(saver: BaseCheckpointSaver[Any], **compiled: Any) -> Pregel:
    child = build_child("inner_one", "inner_two", **compiled)
    builder = StateGraph(Notes)
    builder.add_node("before", note("before"))
    builder.add_node("child", lambda state: {"notes": child.invoke({"notes": [MARKER], "total": 1})["notes"]})
    builder.add_node("embedded", build_child("deep_one", "deep_two"))
    builder.add_sequence([("after", note("after"))])
    for pair in ((START, "before"), ("before", "child"), ("child", "embedded"), ("embedded", "after")):
        builder.add_edge(*pair)
    return builder.compile(checkpointer=saver)


def build_stateful_subgraph(saver: BaseCheckpointSaver[Any]) -> Pregel:
    builder = StateGraph(Notes)
    builder.add_node("before", note("before"))
    builder.add_node("child", build_child("inner_one", "inner_two", checkpointer=True))
    builder.add_edge(START, "before")
    builder.add_edge("before", "child")
    return builder.compile(checkpointer=saver)


def run_twice(run: Run) -> Generator[Call, Any, None]:
    yield run.invoke({"notes": [MARKER], "title": "first"})
    yield run.state()
    yield run.invoke({"notes": ["more"], "title": "second"})


# -- interrupts --------------------------------------------------------------------------------------------------


def ask(state: Any) -> dict[str, Any]:
    name = interrupt({"question": "name?", "why": [MARKER]})
    age = interrupt({"question": "age?"})
    return {"notes": [f"{name} is {age}"], "total": 1}


def build_interrupts(saver: BaseCheckpointSaver[Any]) -> Pregel:
    builder = StateGraph(Notes)
    builder.add_node("ask", ask)
    builder.add_node("sibling", note("sibling"))
    builder.add_node("confirm", lambda state: {"notes": [interrupt(f"sure of {len(state['notes'])}?")]})
    builder.add_node("end", note("end"))
    builder.add_edge(START, "ask")
    builder.add_edge(START, "sibling")
    builder.add_edge(START, "confirm")
    builder.add_edge(["ask", "sibling", "confirm"], "end")
    return builder.compile(checkpointer=saver)


def run_interrupts(run: Run) -> Generator[Call, Any, None]:
    yield run.invoke({"notes": [MARKER]})
    state = yield run.state()
    pending = {i.value if isinstance(i.value, str) else i.value["question"]: i.id for i in state.interrupts}
    yield run.invoke(Command(resume={pending["name?"]: "Ada"}))
    yield run.state()
    yield run.invoke(Command(resume={pending["sure of 1?"]: "yes"}))
    state = yield run.state()
    assert [i.value for i in state.interrupts] == [{"question": "age?"}]
    yield run.invoke(Command(resume=36))


def build_interrupts_in_subgraph(saver: BaseCheckpointSaver[Any]) -> Pregel:
    child = StateGraph(Notes)
    child.add_node("inner", note("inner"))
    child.add_node("ask", ask)
    child.add_edge(START, "inner")
    child.add_edge("inner", "ask")
    builder = StateGraph(Notes)
    builder.add_node("before", note("before"))
    builder.add_node("child", child.compile())
    builder.add_node("after", note("after"))
    for pair in ((START, "before"), ("before", "child"), ("child", "after")):
        builder.add_edge(*pair)
    return builder.compile(checkpointer=saver)


def run_interrupts_in_subgraph(run: Run) -> Generator[Call, Any, None]:
    yield run.invoke({"notes": [MARKER]})
    state = yield run.state()
    inner = state.tasks[0].state
    assert inner.next == ("ask",)
    yield run.update({"notes": ["told from outside"]}, config=inner.config)
    yield run.state()
    yield run.invoke(Command(resume="Ada"))
    state = yield run.state()
    yield run.history(state.tasks[0].state.config)
    yield run.invoke(Command(resume=36))


# -- time travel and updates -------------------------------------------------------------------------------------


def build_chain(saver: BaseCheckpointSaver[Any], **compiled: Any) -> Pregel:
    return build_child("a", "b", "c", checkpointer=saver, **compiled)


def build_stopping_chain(saver: BaseCheckpointSaver[Any]) -> Pregel:
    return build_chain(saver, interrupt_before=["b"], interrupt_after=["b"])


def run_time_travel(run: Run) -> Generator[Call, Any, None]:
    yield run.invoke({"notes": [MARKER], "title": "first"})
    yield run.invoke({"notes": ["second"], "title": "second"})
    history = yield run.history()
    # With durability "exit" only the ends of the runs were saved.
    old = next((s for s in reversed(history) if s.next == ("b",)), history[-1])
    yield run.state(old.config)
    yield run.invoke(None, old.config)
    yield run.state()
    forked = yield run.update({"notes": ["forked"], "title": "fork"}, as_node="a", config=old.config)
    yield run.state()
    yield run.invoke(None, forked)
    yield run.state(old.config)
    yield run.history()
    yield run.invoke({"notes": ["third"]})


def run_update_state(run: Run) -> Generator[Call, Any, None]:
    yield run.update({"notes": [f"{MARKER} before the first run"]}, as_node="__start__")
    yield run.invoke({"notes": ["input"], "title": "asked"})
    yield run.update({"notes": ["corrected"], "title": "corrected"})
    yield run.state()
    yield run.invoke(None)
    yield run.update({"notes": ["as c"]}, as_node="c")
    yield run.invoke({"notes": ["again"]})
    yield run.invoke(None)
    yield run.invoke(None)


# -- delta channels ----------------------------------------------------------------------------------------------


def extend(state: list[Any], writes: Sequence[list[Any]]) -> list[Any]:
    return [*state, *(item for items in writes for item in items)]


def merge(state: dict[str, Any], writes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {**state, **{key: value for items in writes for key, value in items.items()}}


class Deltas(TypedDict, total=False):
    log: Annotated[list[Any], DeltaChannel(extend, snapshot_frequency=3)]
    facts: Annotated[dict[str, Any], DeltaChannel(merge, snapshot_frequency=1000)]
    total: Annotated[int, operator.add]


def build_deltas(saver: BaseCheckpointSaver[Any]) -> Pregel:
    def node(name: str) -> Callable[[Any], dict[str, Any]]:
        def run(state: Any) -> dict[str, Any]:
            seen = len(state["log"])
            return {"log": [f"{name} after {seen}"], "facts": {f"{name}{seen}": [MARKER]}, "total": 1}

        return run

    builder = StateGraph(Deltas)
    for name in ("a", "b", "c"):
        builder.add_node(name, node(name))
    builder.add_node("reset", lambda state: {"log": Overwrite([f"reset {MARKER}"])})
    builder.add_edge(START, "a")
    builder.add_edge(START, "b")
    builder.add_edge(["a", "b"], "c")
    builder.add_conditional_edges(
        "c", lambda state: "reset" if len(state["log"]) > 11 else END, {"reset": "reset", END: END}
    )
    return builder.compile(checkpointer=saver)


def run_deltas(run: Run) -> Generator[Call, Any, None]:
    for turn in range(4):
        yield run.invoke({"log": [f"{MARKER} {turn}"]})
        yield run.state()
    yield run.update({"log": ["updated"], "facts": {"updated": True}}, as_node="c")
    history = yield run.history()
    old = history[len(history) // 2]
    forked = yield run.update({"log": ["forked"], "facts": {"forked": True}}, as_node="c", config=old.config)
    yield run.state(forked)
    yield run.invoke({"log": ["after the fork"]})


# -- failures ----------------------------------------------------------------------------------------------------


def failing(failures: int, error: type[Exception]) -> Callable[[Any], dict[str, Any]]:
    """Return a node that fails this many times."""
    left = failures

    def node(state: Any) -> dict[str, Any]:
        nonlocal left
        if left:
            left -= 1
            raise error(f"not yet {MARKER}")
        return {"notes": ["at last"], "total": 1}

    return node


def build_failing(saver: BaseCheckpointSaver[Any]) -> Pregel:
    builder = StateGraph(Notes)
    builder.add_node("before", note("before"))
    builder.add_node("failing", failing(2, RuntimeError))
    builder.add_node("after", note("after"))
    for pair in ((START, "before"), ("before", "failing"), ("failing", "after")):
        builder.add_edge(*pair)
    return builder.compile(checkpointer=saver)


def run_failing(run: Run) -> Generator[Call, Any, None]:
    yield run.invoke({"notes": [MARKER]}, raises=RuntimeError)
    yield run.state()
    yield run.invoke(None, raises=RuntimeError)
    yield run.state()
    yield run.invoke(None)


def build_retrying(saver: BaseCheckpointSaver[Any]) -> Pregel:
    builder = StateGraph(Notes)
    builder.add_node("before", note("before"))
    policy = RetryPolicy(initial_interval=0.001, max_attempts=3, jitter=False, retry_on=ValueError)
    builder.add_node("failing", failing(2, ValueError), retry_policy=policy)
    builder.add_edge(START, "before")
    builder.add_edge("before", "failing")
    return builder.compile(checkpointer=saver)


# -- functions instead of a graph --------------------------------------------------------------------------------


def build_functions(saver: BaseCheckpointSaver[Any]) -> Pregel:
    @task
    def square(n: int) -> dict[str, Any]:
        return {"square": n * n, "by": [MARKER]}

    @entrypoint(checkpointer=saver)
    def workflow(n: int, *, previous: Any = None) -> Any:
        squares = [future.result() for future in [square(n), square(n + 1)]]
        answer = interrupt({"question": f"enough after {n}?"})
        return entrypoint.final(
            value=[answer, *squares], save=[*(previous or []), *(found["square"] for found in squares)]
        )

    return workflow


def run_functions(run: Run) -> Generator[Call, Any, None]:
    for n in (2, 5):
        yield run.invoke(n)
        yield run.state()
        yield run.invoke(Command(resume=f"yes, {n}"))


# -- values of many types ----------------------------------------------------------------------------------------


class Colour(str, Enum):  # noqa: UP042 - what applications written before StrEnum hold
    RED = "red"


class Level(IntEnum):
    HIGH = 3


@dataclass
class Point:
    x: float
    tags: list[str]


class Model(BaseModel):
    name: str
    when: datetime


class Everything(TypedDict, total=False):
    text: str
    number: int
    ratio: float
    flag: bool
    nothing: None
    colour: Colour
    level: Level
    point: Point
    model: Model
    mixed: Annotated[list[Any], operator.add]


def build_everything(saver: BaseCheckpointSaver[Any]) -> Pregel:
    def fill(state: Any) -> dict[str, Any]:
        return {
            "text": 'ünïcödé 🦜 "quoted" \\u0000 \\ end',
            "number": 2**40,
            "ratio": -1.5e-7,
            "flag": True,
            "nothing": None,
            "colour": Colour.RED,
            "level": Level.HIGH,
            "point": Point(0.1, [MARKER]),
            "model": Model(name=MARKER, when=datetime(2024, 2, 29, tzinfo=UTC)),
            "mixed": [
                {"tuple": (1, "a"), "set": {3}, "bytes": b"\x00\xff", 7: "seven"},
                Decimal("1.10"),
                UUID("12345678-1234-5678-1234-567812345678"),
                date(2024, 2, 29),
                timedelta(seconds=1.5),
                np.arange(6, dtype=np.float32).reshape(2, 3),
                "nul \x00 inside",
                1e300,
            ],
        }

    builder = StateGraph(Everything)
    builder.add_node("fill", fill)
    builder.add_node("more", lambda state: {"mixed": [type(state["model"]).__name__], "number": state["number"] + 1})
    builder.add_edge(START, "fill")
    builder.add_edge("fill", "more")
    return builder.compile(checkpointer=saver)


def run_everything(run: Run) -> Generator[Call, Any, None]:
    yield run.invoke({"mixed": [MARKER], "text": ""})
    yield run.state()
    yield run.invoke({"mixed": [None, ""], "text": "x" * 5000})


SCENARIOS = {
    "tool_agent": Scenario(build_tool_agent, run_tool_agent),
    "fan_out": Scenario(build_fan_out, run_fan_out),
    "subgraph": Scenario(build_subgraph, run_twice),
    "subgraph_with_memory": Scenario(build_stateful_subgraph, run_twice, ("", "child")),
    "interrupts": Scenario(build_interrupts, run_interrupts),
    "interrupts_in_subgraph": Scenario(build_interrupts_in_subgraph, run_interrupts_in_subgraph),
    "time_travel": Scenario(build_chain, run_time_travel),
    "update_state": Scenario(build_stopping_chain, run_update_state),
    "delta_channels": Scenario(build_deltas, run_deltas),
    "node_error": Scenario(build_failing, run_failing),
    "retries": Scenario(build_retrying, run_twice),
    "functions": Scenario(build_functions, run_functions),
    "many_types": Scenario(build_everything, run_everything),
}


# -- a database --------------------------------------------------------------------------------------------------


@contextmanager
def database_with_tables(postgres_uri: str, redis_url: str) -> Iterator[str]:
    """Make a database that is set up; many tests can share it, which saves each the migrations."""
    name = f"shared_{uuid4().hex}"
    with psycopg.connect(postgres_uri, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        uri = with_database(postgres_uri, name)
        with BufferedPostgresSaver.from_conn_string(uri, redis_url=redis_url, hooks=(), triggers=frozenset()) as saver:
            saver.setup()
        yield uri
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


# -- making the calls -------------------------------------------------------------------------------------------


def make_calls(steps: Generator[Call, Any, None]) -> None:
    result = None
    while True:
        try:
            call = steps.send(result)
        except StopIteration:
            return
        try:
            result = getattr(call.target, call.method)(*call.args, **call.named)
            if call.method == "get_state_history":
                result = list(result)
            assert call.raises is None, f"{call.method} did not raise {call.raises}"
        except Exception as exc:
            if call.raises is None or not isinstance(exc, call.raises):
                raise
            result = exc


async def make_calls_async(steps: Generator[Call, Any, None]) -> None:
    result = None
    while True:
        try:
            call = steps.send(result)
        except StopIteration:
            return
        try:
            answer = getattr(call.target, "a" + call.method)(*call.args, **call.named)
            result = [item async for item in answer] if call.method == "get_state_history" else await answer
            assert call.raises is None, f"{call.method} did not raise {call.raises}"
        except Exception as exc:
            if call.raises is None or not isinstance(exc, call.raises):
                raise
            result = exc


# -- comparing ---------------------------------------------------------------------------------------------------

_VERSION = re.compile(r"(\d{32})\.\d+\.\d+(?:e-\d+)?")
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00")


class Plain:
    """Turns values into plain ones that compare: types kept, ids replaced by the order of their first appearance.

    Args:
        thread_id: Is replaced, too.
        exact: Replace nothing.
    """

    def __init__(self, thread_id: str = "", *, exact: bool = False) -> None:
        self._thread_id = thread_id
        self._exact = exact
        self._ids: dict[str, str] = {}

    def text(self, value: str) -> str:
        if self._exact:
            return value
        value = _VERSION.sub(lambda m: f"version {int(m[1])}", value)
        value = _ID.sub(lambda m: self._ids.setdefault(m[0], f"id {len(self._ids)}"), value)
        return _TIME.sub("time", value).replace(self._thread_id or "\0", "thread")

    def __call__(self, value: Any) -> Any:
        kind = type(value).__name__
        if value is None or isinstance(value, bytes | bool):
            return value
        if type(value) is str:
            return self.text(value)
        if isinstance(value, int | float | str):
            return kind, value if not isinstance(value, str) else self.text(value)
        if isinstance(value, dict):
            # JSONB has an order of its own. Ids in keys say nothing about order.
            items = sorted(value.items(), key=lambda item: (_ID.sub("", str(item[0])), repr(type(item[0]))))
            return {str(self(key)): self(item) for key, item in items}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind, {name: self(getattr(value, name)) for name in value._fields}
        if isinstance(value, list | tuple):
            return kind, [self(item) for item in value]
        if isinstance(value, set | frozenset):
            return kind, sorted(repr(self(item)) for item in value)
        if isinstance(value, BaseMessage) and not self._exact and (value.id is None or _ID.search(value.id)):
            # LangGraph gives an id to a message that has none while it may still be on its way to the saver.
            return kind, self({**dict(value), "id": "given by LangGraph"})
        if isinstance(value, BaseModel):
            return kind, self(dict(value))
        if isinstance(value, Interrupt):
            return kind, self(value.value), self.text(value.id)
        if isinstance(value, Send):
            return kind, value.node, self(value.arg)
        if isinstance(value, np.ndarray):
            return kind, str(value.dtype), value.tolist()
        if dataclasses.is_dataclass(value):
            return kind, {f.name: self(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return kind, self.text(repr(value))


def plain(value: Any, thread_id: str) -> Any:
    """Make a value of one thread comparable with the same of another one."""
    return Plain(thread_id)(value)


def exactly(value: Any) -> Any:
    """Make a value comparable with another reading of the same."""
    return Plain(exact=True)(value)


def sorted_interrupts(result: Any) -> Any:
    """Order the interrupts of parallel tasks: they are reported as they come."""
    if isinstance(result, dict) and "__interrupt__" in result:
        return {**result, "__interrupt__": sorted(result["__interrupt__"], key=lambda i: repr(i.value))}
    return result


def assert_equal(ours: Any, theirs: Any) -> None:
    """Name the places where two plain values differ."""
    found = _differences(ours, theirs, "")
    if found:
        raise AssertionError(f"{len(found)} differences:\n" + "\n".join(found[:10]))


def _differences(ours: Any, theirs: Any, path: str) -> list[str]:
    if type(ours) is type(theirs) and isinstance(ours, list | tuple) and len(ours) == len(theirs):
        pairs = zip(ours, theirs, strict=True)
        return [d for i, (own, other) in enumerate(pairs) for d in _differences(own, other, f"{path}[{i}]")]
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [d for key in ours for d in _differences(ours[key], theirs[key], f"{path}.{key}")]
    return [] if ours == theirs else [f"{path or 'all'}: {ours!r}\n    is not {theirs!r}"]
