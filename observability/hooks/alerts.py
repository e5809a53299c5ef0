"""The hook that sends alerts, set up from the environment; see `docs/alerts.md`.

CHECKPOINTER_ALERT_WEBHOOK is a URL, CHECKPOINTER_ALERT_WEBHOOK_SECRET signs what is sent there,
CHECKPOINTER_ALERT_APPRISE has addresses for Apprise, CHECKPOINTER_ALERT_DIGEST_HOUR is an hour in UTC, or `off`.
Not here: the alerts themselves (`observability/alerts/`), which code can set up as well.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from checkpointer.errors import ConfigurationError
from observability.alerts import Alerts, Webhook, apprise_channels

if TYPE_CHECKING:
    from checkpointer.hooks import HookContext
    from observability.alerts import Channel

_WEBHOOK = "CHECKPOINTER_ALERT_WEBHOOK"
_SECRET = "CHECKPOINTER_ALERT_WEBHOOK_SECRET"
_APPRISE = "CHECKPOINTER_ALERT_APPRISE"
_DIGEST_HOUR = "CHECKPOINTER_ALERT_DIGEST_HOUR"
_USUAL_HOUR = "7"


def create(context: HookContext) -> Alerts:
    """Return the hook, and start looking for what is worth an alert.

    Raises:
        ConfigurationError: The environment names no channel, or one that cannot be used.
    """
    channels: list[Channel] = []
    if url := os.environ.get(_WEBHOOK):
        channels.append(Webhook(url, secret=os.environ.get(_SECRET) or None))
    if urls := os.environ.get(_APPRISE):
        channels += apprise_channels(urls)
    if not channels:
        raise ConfigurationError(f"the hook `alerts` needs somewhere to send to: set {_WEBHOOK} or {_APPRISE}")
    return Alerts(
        context.connect_postgres,
        channels,
        digest_hour=_hour(os.environ.get(_DIGEST_HOUR) or _USUAL_HOUR),
        source=f"/checkpointer/{context.prefix}",
        emit=context.emit,
    )


def _hour(text: str) -> int | None:
    if text.strip().lower() == "off":
        return None
    if not (text.strip().isascii() and text.strip().isdigit() and int(text) <= 23):
        raise ConfigurationError(f"{_DIGEST_HOUR}={text!r} has to be an hour of the day (UTC), 0 to 23, or off")
    return int(text)
