"""What is ready to be loaded into other tools: a dashboard for Grafana, and alert rules for Prometheus.

Both ask for the names of `checkpointer/metrics.py`, whoever shows them: a worker, a saver with the hook `prometheus`,
or an exporter of OpenTelemetry.
"""

from __future__ import annotations

from importlib.resources import files

from checkpointer.errors import ConfigurationError

__all__ = ["names", "text"]


def names() -> list[str]:
    """Return the names of the files, sorted."""
    return sorted(entry.name for entry in files(__name__).iterdir() if entry.name.endswith((".json", ".yml")))


def text(name: str) -> str:
    """Return a file's text.

    Raises:
        ConfigurationError: No such name; the message lists the known ones.
    """
    known = names()
    if name not in known:
        raise ConfigurationError(f"there is no file named {name!r}; known are: {', '.join(known)}")
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
