"""Whose instruments are shown together on one thing of the application's, such as a registry of Prometheus.

A process may have several savers, and some with one prefix, while a registry takes each name only once. So there is one
*joint* for each registry, and savers come and go. It is kept on the registry itself: it lives exactly as long, and two
threads that want one get the same. Not here: any format.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from checkpointer.hooks import renew_in_child
from checkpointer.instruments import joined

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointer.instruments import Instruments, Reading

_ATTRIBUTE = "_checkpointer_joint"


class HasInstruments(Protocol):
    """A saver, a worker that was started, or a `HookContext`."""

    @property
    def instruments(self) -> Instruments:
        """What it can be measured by."""


class Joint:
    """See the module."""

    def __init__(self) -> None:
        # Replaced, never changed, so that it can be read without a lock.
        self._members: tuple[_Member, ...] = ()
        self._renew()
        renew_in_child(self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @classmethod
    def on(cls, owner: object) -> Self:
        """Return the joint of an object of the application's."""
        found: Self | None = vars(owner).get(_ATTRIBUTE)
        if found is None:
            found = vars(owner).setdefault(_ATTRIBUTE, cls())
        return found

    def add(self, instruments: Instruments) -> Callable[[], None]:
        """Show these instruments too.

        Returns:
            A callable that takes them back; it may be called again.
        """
        member = _Member(instruments)
        with self._lock:
            before = self._members
            self._members = (*before, member)
            if not before:
                try:
                    self.begin()
                except BaseException:
                    self._members = before
                    raise

        def remove() -> None:
            with self._lock:
                if member in self._members:
                    self._members = tuple(one for one in self._members if one is not member)
                    if not self._members:
                        self.end()

        return remove

    def begin(self) -> None:
        """Called when there is something to show."""

    def end(self) -> None:
        """Called when there is nothing to show any more."""

    def read(self) -> dict[str, list[Reading]]:
        """Return what the metrics say now, by prefix."""
        by_prefix: dict[str, dict[Instruments, None]] = {}
        for member in self._members:
            by_prefix.setdefault(member.instruments.prefix, {})[member.instruments] = None
        return {prefix: joined(one.read() for one in members) for prefix, members in by_prefix.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    instruments: Instruments
