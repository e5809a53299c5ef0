"""What is said when an optional library is missing."""

from __future__ import annotations

from checkpointer.errors import ConfigurationError


def missing_extra(what: str, extra: str) -> ConfigurationError:
    """Return the error that says what to install.

    Args:
        what: What needs it, as the subject of a sentence.
        extra: The extra that brings it.
    """
    return ConfigurationError(f'{what} needs a library: pip install "langgraph-checkpoint-buffered[{extra}]"')
