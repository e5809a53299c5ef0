"""Mail, Slack, Telegram and a hundred others, by the library Apprise (the extra `alerts`).

Each service is a channel of its own, so that one that has a message does not get it again because another was away.
Not here: the addresses' syntax (https://github.com/caronc/apprise/wiki).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checkpointer.errors import ConfigurationError
from observability.alerts.channels import AlertDeliveryError

if TYPE_CHECKING:
    from observability.alerts.messages import Message


class AppriseChannel:
    """A channel to one service.

    Args:
        service: An `apprise.Apprise` object with the service in it.
        name: See `Channel`.
    """

    def __init__(self, service: Any, *, name: str) -> None:
        self.name = name
        self._service = service

    def send(self, message: Message) -> None:
        """Deliver a message; its id is the last line.

        Raises:
            AlertDeliveryError: The service did not take it; Apprise does not say why.
        """
        kind = "failure" if message.severity == "critical" else "info"
        text = f"{message.text}\n\nAlert {message.id}"
        if not self._service.notify(body=text, title=message.title, notify_type=kind, body_format="text"):
            raise AlertDeliveryError("the service did not take it")


def apprise_channels(urls: str) -> list[AppriseChannel]:
    """Make a channel for each of the addresses.

    Args:
        urls: Apprise URLs, with commas or white space between them. Their order is part of what is remembered, so it is
            to be the same in all processes.

    Raises:
        ConfigurationError: Apprise is not installed, or does not know one of the addresses; it is not quoted.
    """
    try:
        import apprise
    except ImportError as exc:
        raise ConfigurationError('Alerts by Apprise need: pip install "langgraph-checkpoint-buffered[alerts]"') from exc
    everything = apprise.Apprise()
    if not everything.add(urls) or not len(everything):
        raise ConfigurationError("Apprise does not know one of the addresses for alerts: see its list of services")
    channels = []
    for number, service in enumerate(everything, 1):
        alone = apprise.Apprise()
        alone.add(service)
        channels.append(AppriseChannel(alone, name=f"apprise-{number}"))
    return channels
