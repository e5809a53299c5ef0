"""A web process: its saver puts into the buffer and leaves flushing to the workers.

Run it: with the others, as README.md says; alone: uvicorn --factory web:create_app
"""

# No `from __future__ import annotations`: FastAPI reads them.

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.graph import START, MessagesState, StateGraph

from checkpointer import BufferedPostgresSaver
from checkpointer.errors import CheckpointerError
from observability.api import Store, create_health_router


def answer(state: MessagesState) -> dict[str, Any]:
    """Stand in for a model: the answer shows that the whole thread is known, whichever process is asked."""
    questions = [message.text for message in state["messages"] if isinstance(message, HumanMessage)]
    return {"messages": [AIMessage(f"That was question {len(questions)}, the first one was {questions[0]!r}.")]}


def create_app() -> FastAPI:
    """Make the application of one process, on the servers that POSTGRES_URI and REDIS_URL name."""
    postgres_uri, redis_url = os.environ["POSTGRES_URI"], os.environ["REDIS_URL"]
    builder = StateGraph(MessagesState)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # No trigger: this process never flushes by itself, so its time is for requests. If no worker runs, the buffer
        # fills to its high-water mark, and from there on puts wait for Postgres; nothing is lost by it.
        async with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, triggers=set()) as saver:
            # Every process may do this at once; the tables are there already where `checkpointer migrate` has run.
            await saver.asetup()
            app.state.graph = builder.compile(checkpointer=saver)
            yield

    app = FastAPI(lifespan=lifespan)
    app.include_router(create_health_router(store=Store(postgres_uri), redis_url=redis_url))

    # Who may ask in which thread is left out here: `bring_your_own_auth.py` shows it.
    @app.post("/threads/{thread_id}")
    async def ask(thread_id: str, text: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        try:
            state = await app.state.graph.ainvoke(
                {"messages": [HumanMessage(text)]}, {"configurable": {"thread_id": thread_id}}
            )
        except CheckpointerError:
            raise HTTPException(503, "This thread cannot be saved or loaded at the moment.") from None
        return {"answer": state["messages"][-1].text, "process": os.getpid()}

    return app
