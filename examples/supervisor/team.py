"""The team: a supervisor that hands work to two others, each a graph of its own, and a person who approves.

The *supervisor* asks a model who is next. The *researcher* looks an order up. The *clerk* pays money back and writes to
the customer, and has to be allowed either. The model is a stand-in, so the team always does the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph

    Graph = CompiledStateGraph[Any, Any, Any, Any]

ORDERS = {"42": {"customer": "Ines", "amount": "30.00 EUR", "problem": "the parcel never arrived"}}


class Case(MessagesState, total=False):
    """What the team knows of a case: all of them read and write it."""

    order: str
    facts: dict[str, str]
    paid: bool


class Approval(TypedDict):
    """What a person is asked; the answer is True or False."""

    who: str
    wants_to: str


class SupervisingModel(BaseChatModel):
    """A stand-in for a chat model that knows the team: it says who is next, or what came of the case."""

    @property
    def _llm_type(self) -> str:
        return "supervising-model"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        spoken = {message.name: message.text for message in messages if isinstance(message, AIMessage)}
        worker = next((name for name in ("researcher", "clerk") if name not in spoken), None)
        reply = AIMessage(f"{worker}, please." if worker else f"The case is closed: {spoken['clerk']}")
        reply.additional_kwargs["next"] = worker
        return ChatResult(generations=[ChatGeneration(message=reply)])


def supervise(state: Case) -> Command[Literal["researcher", "clerk", "__end__"]]:
    """Ask the model who is next, and go there."""
    reply = SupervisingModel().invoke(state["messages"])
    reply.name = "supervisor"
    return Command(goto=reply.additional_kwargs["next"] or END, update={"messages": [reply]})


def look_up(state: Case) -> dict[str, Any]:
    """Find what there is about an order."""
    return {"facts": ORDERS[state["order"]]}


def summarize(state: Case) -> dict[str, Any]:
    """Tell the supervisor."""
    facts = state["facts"]
    told = f"Order {state['order']} of {facts['customer']}, {facts['amount']}: {facts['problem']}."
    return {"messages": [AIMessage(told, name="researcher")]}


def pay(state: Case) -> dict[str, Any]:
    """Pay money back, if a person allows it."""
    # The run ends here and is saved, for seconds or for weeks. When it goes on, this function begins once more and
    # `interrupt` returns the answer: so nothing that must not happen twice stands above it.
    allowed = interrupt(Approval(who="clerk", wants_to=f"pay {state['facts']['amount']} back"))
    if allowed:
        # A process that dies between this and the checkpoint does it again: give the bank a key to know it by, such as
        # the thread's id and the order.
        print(f"   *** {state['facts']['amount']} are paid back")
    return {"paid": bool(allowed)}


def write(state: Case) -> dict[str, Any]:
    """Write to the customer, if a person allows it, and tell the supervisor."""
    letter = "your money is on its way" if state["paid"] else "we cannot pay your money back"
    allowed = interrupt(Approval(who="clerk", wants_to=f"write to {state['facts']['customer']}: {letter!r}"))
    if allowed:
        print(f"   *** the letter is sent: {letter}")
    told = f"{'paid' if state['paid'] else 'not paid'}, {'letter sent' if allowed else 'no letter'}."
    return {"messages": [AIMessage(told, name="clerk")]}


def build_team(saver: BaseCheckpointSaver[Any]) -> Graph:
    """Build the team on any checkpoint saver."""
    researcher = StateGraph(Case)
    researcher.add_sequence([look_up, summarize])
    researcher.add_edge(START, "look_up")

    clerk = StateGraph(Case)
    clerk.add_sequence([pay, write])
    clerk.add_edge(START, "pay")

    team = StateGraph(Case)
    team.add_node("supervisor", supervise)
    # Graphs as nodes, without a saver of their own: they save under the team's thread, in a namespace of theirs.
    team.add_node("researcher", researcher.compile())
    team.add_node("clerk", clerk.compile())
    team.add_edge(START, "supervisor")
    team.add_edge("researcher", "supervisor")
    team.add_edge("clerk", "supervisor")
    return team.compile(checkpointer=saver)
