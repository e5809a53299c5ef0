"""The agent of the chat: a graph with one node, which asks a model that needs no network and no key."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langgraph.graph import START, MessagesState, StateGraph

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph


class RememberingModel(BaseChatModel):
    """A stand-in for a chat model, which shows that it knows the conversation; it answers a word at a time."""

    seconds_per_word: float

    @property
    def _llm_type(self) -> str:
        return "remembering-model"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(_answer(messages)))])

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for word in re.findall(r"\S+\s*", _answer(messages)):
            await asyncio.sleep(self.seconds_per_word)
            yield ChatGenerationChunk(message=AIMessageChunk(word))


def _answer(messages: list[BaseMessage]) -> str:
    said = [message.text for message in messages if isinstance(message, HumanMessage)]
    if len(said) == 1:
        return f"You said: {said[0]}\nSay more, or reload this page: the conversation will still be here."
    return f"You said: {said[-1]}\nBefore that you said: {said[-2]}\nThat makes {len(said)} messages of yours."


def build_agent(saver: BaseCheckpointSaver[Any], seconds_per_word: float) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Build the agent on any checkpoint saver."""
    model = RememberingModel(seconds_per_word=seconds_per_word)

    async def call_model(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("model", call_model)
    builder.add_edge(START, "model")
    return builder.compile(checkpointer=saver)
