"""The console: pages for administrators, made on the server, that work without JavaScript and better with it.

`create_console_router` makes the routes for one's own FastAPI application; `checkpointer serve` has them at /console.
Not here: what is asked and done (`observability/errors/`), and the HTTP interface for programs (`observability/api/`).
"""

from __future__ import annotations

from checkpointer.errors import ConfigurationError

try:
    import jinja2  # noqa: F401 - looked for here, so that it is missed with a sentence that helps

    import observability.api  # noqa: F401 - as above
except ModuleNotFoundError as exc:
    raise ConfigurationError('The console needs: pip install "langgraph-checkpoint-buffered[console]"') from exc

from observability.console.router import create_console_router
from observability.console.sessions import Sessions

__all__ = ["Sessions", "create_console_router"]
