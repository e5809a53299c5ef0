"""The HTTP interface: routers for one's own FastAPI application, and an application that is made of them.

`create_admin_router` is for administrators, `create_thread_router` for the people behind a thread,
`create_health_router` for whatever watches the process; `create_app` puts the three together. Not here: what they
ask and do (`observability/errors/`), and live events (`observability/runs.py`).
"""

from __future__ import annotations

from checkpointer.errors import ConfigurationError

try:
    import fastapi  # noqa: F401 - looked for here, so that it is missed with a sentence that helps
except ModuleNotFoundError as exc:
    raise ConfigurationError('The HTTP interface needs: pip install "langgraph-checkpoint-buffered[api]"') from exc

from observability.api.admin import create_admin_router
from observability.api.app import create_app
from observability.api.authentication import BearerTokens
from observability.api.health import create_health_router
from observability.api.principals import Principal
from observability.api.store import Store
from observability.api.streams import Streams
from observability.api.threads import create_thread_router
from observability.api.tickets import Tickets

__all__ = [
    "BearerTokens",
    "Principal",
    "Store",
    "Streams",
    "Tickets",
    "create_admin_router",
    "create_app",
    "create_health_router",
    "create_thread_router",
]
