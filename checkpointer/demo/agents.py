"""The agents of the demo and what should come of them: LangGraph graphs on a model that answers by rule.

The *travel desk* looks up one city after the other, and answers. The *scorer* divides nothing by nothing. Neither
needs a network, and both do the same each time, so what a thread's state has to be is known beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph, add_messages
from langgraph.prebuilt import ToolNode, tools_condition

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph

__all__ = ["CITIES", "LONG", "Messages", "Score", "Trip", "build_scorer", "build_travel_desk", "config_of"]

CITIES = {
    "Accra": "ferry from quay 2, 30 degrees",
    "Bergen": "night train, 7 degrees and rain",
    "Cusco": "bus over the pass, thin air",
    "Hanoi": "flight by noon, 33 degrees",
    "Izmir": "ferry from quay 5, windy",
    "Tartu": "coach, snow on the road",
}
"""What the tool knows."""

LONG = "Nara"
"""A city about which the tool knows a lot: its answer has more than 20,000 characters."""


@dataclass(frozen=True, slots=True)
class Trip:
    """What somebody asks the travel desk.

    Attributes:
        thread_id: The thread, named for who asks.
        cities: Where to, in the order of asking.
    """

    thread_id: str
    cities: tuple[str, ...]

    @property
    def question(self) -> str:
        """The question."""
        return f"How do I get to {', '.join(self.cities)}?"

    @property
    def answer(self) -> str:
        """What the travel desk answers in the end."""
        return "; ".join(_look_up(city) for city in self.cities)

    @property
    def transcript(self) -> list[tuple[str, str]]:
        """What the thread's messages have to be: the kind and the content of each."""
        found = [said for city in self.cities for said in (("ai", ""), ("tool", _look_up(city)))]
        return [("human", self.question), *found, ("ai", self.answer)]

    def input(self) -> Messages:
        """Return the graph's input."""
        return {"messages": [HumanMessage(self.question)]}


def config_of(thread_id: str) -> RunnableConfig:
    """Return the config of a thread's runs."""
    return {"configurable": {"thread_id": thread_id}}


class Messages(TypedDict):
    """The state of the travel desk."""

    messages: Annotated[list[AnyMessage], add_messages]


class Score(TypedDict, total=False):
    """The state of the scorer."""

    question: str
    score: float
    details: dict[str, Any]


class _FakeModel(BaseChatModel):
    """A chat model that calls a tool for each city of the last question, and then answers with the results."""

    @property
    def _llm_type(self) -> str:
        return "fake"

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=_next_message(messages))])


def _next_message(messages: list[BaseMessage]) -> AIMessage:
    asked = max(place for place, message in enumerate(messages) if isinstance(message, HumanMessage))
    question = str(messages[asked].content)
    cities = sorted((city for city in (*CITIES, LONG) if city in question), key=question.find)
    found = [str(message.content) for message in messages[asked:] if isinstance(message, ToolMessage)]
    if len(found) == len(cities):
        return AIMessage("; ".join(found))
    city = cities[len(found)]
    return AIMessage("", tool_calls=[{"name": "look_up", "args": {"city": city}, "id": f"{asked}-{city}"}])


def _look_up(city: str) -> str:
    return f"{city}: {'temples and deer, ' * 1_200 if city == LONG else CITIES[city]}"


def build_travel_desk(
    saver: BaseCheckpointSaver[Any], wait: Callable[[], None] = lambda: None
) -> CompiledStateGraph[Messages, None, Messages, Messages]:
    """Build the agent that looks up cities.

    Args:
        saver: Any LangGraph checkpoint saver.
        wait: Called by the tool before it answers: what makes a run last.
    """

    @tool
    def look_up(city: str) -> str:
        """Say how one gets to a city."""
        wait()
        return _look_up(city)

    model = _FakeModel()

    def call_model(state: Messages) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(Messages)
    builder.add_node("model", call_model)
    builder.add_node("tools", ToolNode([look_up]))
    builder.add_edge(START, "model")
    builder.add_conditional_edges("model", tools_condition)
    builder.add_edge("tools", "model")
    return builder.compile(checkpointer=saver)


def build_scorer(saver: BaseCheckpointSaver[Any]) -> CompiledStateGraph[Score, None, Score, Score]:
    """Build the graph whose score is not a number."""

    def score(state: Score) -> Score:
        return {"score": math.nan, "details": {"answers": 0, "mean": math.inf}}

    builder = StateGraph(Score)
    builder.add_node("score", score)
    builder.add_edge(START, "score")
    builder.add_edge("score", END)
    return builder.compile(checkpointer=saver)
