"""Something to look at: threads of an assistant, errors of a day, a dead letter, and what waits in Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.graph import END, START, StateGraph, add_messages
from poisoning import allow, forbid, put_steps

if TYPE_CHECKING:
    import psycopg
    from savers import Recording

POISONED = "order-7731"
WAITING = "support-1042"
FLUSHED = "support-1041"

TRACE = """Traceback (most recent call last):
  File "/srv/assistant/app/graph.py", line 88, in answer
    await graph.ainvoke(state, config)
  File "/usr/lib/python3.11/site-packages/langgraph/pregel/main.py", line 3026, in ainvoke
    async for chunk in self.astream(
  File "/usr/lib/python3.11/site-packages/langgraph/pregel/main.py", line 2866, in astream
    async for _ in runner.atick(
psycopg.errors.ConnectionTimeout: connection timeout expired"""

# (type, severity, message, component, how many in which hours of the last 24)
_KINDS = [
    ("checkpoint_lost", "critical", "A checkpoint could not be saved anywhere.", "saver", {6: 2}),
    (
        "postgres_connection_error",
        "error",
        "Postgres cannot be reached; puts stay in the buffer.",
        "store",
        {6: 9, 7: 14},
    ),
    (
        "checkpoint_flush_error",
        "error",
        "The flush failed: connection timeout expired.",
        "flusher",
        {6: 21, 7: 33, 8: 4},
    ),
    (
        "non_finite_value",
        "warning",
        "NaN at messages[2].score was stored as null.",
        "serializer",
        {1: 3, 2: 1, 5: 2, 9: 4, 13: 2, 17: 3, 20: 1},
    ),
    ("redis_slow", "warning", "Redis took 412 ms for a put.", "buffer", {3: 2, 11: 5, 12: 8, 19: 2}),
]

_ERROR = """
INSERT INTO system_errors (error_type, severity, thread_id, error_message, component, operation, stack_trace,
    error_context, created_at, recorded_at, event_id, fingerprint, occurrences, outcome, run_id)
SELECT %(type)s, %(severity)s, 'support-' || 1000 + n %% 60, %(message)s, %(component)s, 'put', %(trace)s,
    '{"attempt": 3, "checkpoint_count": 2}', at, at, gen_random_uuid(), 'v1:' || %(type)s, 1,
    CASE WHEN %(severity)s = 'critical' THEN 'lost' END, 'run-' || n
FROM generate_series(1, %(count)s) AS n,
    LATERAL (SELECT date_trunc('hour', now()) - make_interval(hours => %(hour)s) + n * interval '41 seconds' AS at) AS t
"""
_GROUP = """
INSERT INTO system_error_groups (fingerprint, error_type, severity, title, component, first_seen_at, last_seen_at,
    occurrences)
SELECT 'v1:' || error_type, error_type, max(severity), max(error_message), max(component), min(created_at),
    max(created_at), count(*)
FROM system_errors GROUP BY error_type
ON CONFLICT (fingerprint) DO NOTHING
"""
_HOURLY = """
INSERT INTO system_error_hourly (fingerprint, hour, error_type, severity, occurrences)
SELECT fingerprint, date_trunc('hour', created_at, 'UTC'), error_type, severity, count(*)
FROM system_errors GROUP BY 1, 2, 3, 4
ON CONFLICT DO NOTHING
"""
_LINE = "INSERT INTO thread_logs (thread_id, level, message, created_at) VALUES (%s, %s, %s, now())"


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    order: str


def _graph(saver: Any) -> Any:
    def understand(state: State) -> dict[str, Any]:
        return {"order": "A-4711"}

    def answer(state: State) -> dict[str, Any]:
        count = len(state["messages"])
        return {"messages": [AIMessage(f"Your order A-4711 is on its way (answer {count}).")]}

    builder = StateGraph(State)
    builder.add_node("understand", understand)
    builder.add_node("answer", answer)
    builder.add_edge(START, "understand")
    builder.add_edge("understand", "answer")
    builder.add_edge("answer", END)
    return builder.compile(checkpointer=saver)


def talk(saver: Any, thread: str, *questions: str) -> None:
    graph = _graph(saver)
    for question in questions:
        graph.invoke({"messages": [HumanMessage(question)]}, {"configurable": {"thread_id": thread}})


def plant_errors(conn: psycopg.Connection[Any]) -> None:
    for kind, severity, message, component, hours in _KINDS:
        for hour, count in hours.items():
            values = {"type": kind, "severity": severity, "message": message, "component": component}
            conn.execute(_ERROR, values | {"trace": TRACE, "count": count, "hour": hour})
    conn.execute(_GROUP)
    conn.execute(_HOURLY)


def plant_letter(saver: Recording, conn: psycopg.Connection[Any], thread: str = POISONED) -> int:
    """Have Postgres refuse a record, and return the number of its dead letter; the next time it is taken."""
    forbid(conn)
    put_steps(saver, thread, 3, {1: "blob"})
    saver.flush()
    allow(conn)
    return saver.dead_letters.list()[0].id


def plant(saver: Recording, conn: psycopg.Connection[Any]) -> int:
    """Plant everything, and return the number of the dead letter."""
    for number in range(1030, 1041):
        talk(saver, f"support-{number}", "Where is my order?")
    talk(saver, FLUSHED, "Where is my order?", "And when will it be here?", "Thank you!")
    saver.flush()
    plant_errors(conn)
    conn.execute(_LINE, (FLUSHED, "warning", "Saving is slower than usual; nothing is lost."))
    conn.execute(_LINE, (FLUSHED, "info", "Saving works again."))
    letter = plant_letter(saver, conn)
    talk(saver, WAITING, "Can I send it back?")
    return letter
