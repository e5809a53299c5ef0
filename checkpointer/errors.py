"""The errors that the saver raises, under one base.

Each message says what happened and what to do; the cause is kept as `__cause__`.
"Door" errors are raised before anything is written.
"""

from __future__ import annotations


class CheckpointerError(Exception):
    """Base of every error of this package."""


class ConfigurationError(CheckpointerError, ValueError):
    """An option, a URI or a combination of arguments cannot work; nothing was started."""


class InvalidConfigError(CheckpointerError, ValueError):
    """A call's `config` lacks something or holds an id that Postgres cannot store; nothing was written."""


class UnserializableValueError(CheckpointerError, TypeError):
    """A value cannot be serialised; the message names it by its path, and nothing was written."""


class NonFiniteValueError(CheckpointerError, ValueError):
    """`non_finite="raise"` met NaN or Infinity; the message names its path, and nothing was written."""


class UnsupportedServerError(CheckpointerError):
    """A server is too old or is set up in a way that cannot keep the guarantees."""


class NotSetUpError(CheckpointerError):
    """The tables are missing: call `setup()` or run `checkpointer migrate`."""


class MigrationError(CheckpointerError):
    """A migration failed, or an applied one was changed afterwards."""


class ClosedError(CheckpointerError, RuntimeError):
    """The saver was used after it was closed."""


class WrongLoopError(CheckpointerError, RuntimeError):
    """A blocking call was made where it would wait for the very event loop that it blocks."""


class TierUnavailableError(CheckpointerError, ConnectionError):
    """A server that is needed for a complete answer cannot be reached; nothing was answered from less."""


class BufferUnavailableError(TierUnavailableError):
    """Redis cannot be reached and Postgres alone is not known to be complete."""


class StoreUnavailableError(TierUnavailableError):
    """Postgres cannot be reached and Redis alone is not known to be complete."""


class CheckpointLostError(TierUnavailableError):
    """Neither Redis nor Postgres took the put; the run's steps from here on are not saved."""


class AcknowledgementError(TierUnavailableError):
    """A put is in the buffer, but not as safe as the acknowledgement level asked for; it will be flushed."""


class UnknownDeadLetterError(CheckpointerError, LookupError):
    """There is no dead letter with this number in this application."""


class FlushIncompleteError(CheckpointerError):
    """An operation needs the thread in Postgres, and it could not be flushed; retry later."""
