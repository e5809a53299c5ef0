"""The agent and the servers that the examples share: no API key, and no server to install.

The *model* is a stand-in for a chat model. It reads the last question, asks for one tool call at a time, and answers
when it has a result for each city. It always answers the same, so what the examples print can be relied on.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.graph import START, StateGraph, add_messages
from langgraph.prebuilt import ToolNode, tools_condition

from checkpointer import BufferedPostgresSaver, embedded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph

WEATHER = {
    "Lima": "19 degrees, overcast",
    "Nairobi": "24 degrees, clear",
    "Oslo": "4 degrees, snow",
    "Paris": "11 degrees, rain",
    "Quito": "15 degrees, fog",
    "Tunis": "21 degrees, windy",
}


@dataclass(frozen=True)
class Addresses:
    """Where the two servers are."""

    postgres_uri: str
    redis_url: str


@contextmanager
def addresses() -> Iterator[Addresses]:
    """The servers that POSTGRES_URI and REDIS_URL name, or a private pair for as long as the block lasts."""
    postgres_uri, redis_url = os.environ.get("POSTGRES_URI"), os.environ.get("REDIS_URL")
    if postgres_uri and redis_url:
        yield Addresses(postgres_uri, redis_url)
    else:
        with embedded.servers() as pair:
            yield Addresses(pair.postgres_uri, pair.redis_url)


class WeatherModel(BaseChatModel):
    """A chat model that calls the tool `weather`, one city after the other."""

    @property
    def _llm_type(self) -> str:
        return "weather-model"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        """Return the model itself: it knows its one tool."""
        return self

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=_answer(messages))])


def _answer(messages: list[BaseMessage]) -> AIMessage:
    asked = max(i for i, message in enumerate(messages) if isinstance(message, HumanMessage))
    question = str(messages[asked].content)
    cities = sorted((city for city in WEATHER if city in question), key=question.find)
    results = [str(message.content) for message in messages[asked:] if isinstance(message, ToolMessage)]
    if len(results) < len(cities):
        call = {"name": "weather", "args": {"city": cities[len(results)]}, "id": f"call-{asked}-{len(results)}"}
        return AIMessage("", tool_calls=[call])
    if results:
        return AIMessage("; ".join(results))
    earlier = [str(message.content) for message in messages[:asked] if isinstance(message, HumanMessage)]
    return AIMessage(f"Before that you asked: {earlier[-1]}" if earlier else "Ask me about the weather.")


class State(TypedDict):
    """The state of the agent."""

    messages: Annotated[list[AnyMessage], add_messages]


def build_agent(
    saver: BaseCheckpointSaver[Any], *, seconds_per_call: float = 0.0
) -> CompiledStateGraph[State, None, State, State]:
    """Build the agent: a model that calls a tool until it can answer.

    Args:
        saver: Any LangGraph checkpoint saver.
        seconds_per_call: How long one call of the tool takes.
    """

    @tool
    def weather(city: str) -> str:
        """Say what the weather is like in a city."""
        time.sleep(seconds_per_call)
        return f"{city}: {WEATHER[city]}"

    model = WeatherModel().bind_tools([weather])

    def call_model(state: State) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(State)
    builder.add_node("model", call_model)
    builder.add_node("tools", ToolNode([weather]))
    builder.add_edge(START, "model")
    builder.add_conditional_edges("model", tools_condition)
    builder.add_edge("tools", "model")
    return builder.compile(checkpointer=saver)


def ask(question: str) -> dict[str, Any]:
    """Return the graph's input for a question."""
    return {"messages": [HumanMessage(question)]}


def thread(name: str) -> RunnableConfig:
    """Return the config of a thread that no earlier run of an example has used."""
    return {"configurable": {"thread_id": f"{name}-{os.urandom(3).hex()}"}}


class NotingSaver(BufferedPostgresSaver):
    """Notes each checkpoint that was acknowledged: the examples check these against Postgres.

    Attributes:
        acknowledged: Ids of the checkpoints for which `put` or `aput` has returned.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.acknowledged: list[str] = []

    def put(self, *args: Any, **kwargs: Any) -> RunnableConfig:
        """See `BufferedPostgresSaver.put`."""
        return self._noted(super().put(*args, **kwargs))

    async def aput(self, *args: Any, **kwargs: Any) -> RunnableConfig:
        """See `BufferedPostgresSaver.aput`."""
        return self._noted(await super().aput(*args, **kwargs))

    def _noted(self, saved: RunnableConfig) -> RunnableConfig:
        self.acknowledged.append(saved["configurable"]["checkpoint_id"])
        return saved
