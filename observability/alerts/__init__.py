"""Alerts: someone is told when critical errors arrive, when that is over, and once a day what happened.

Each message is sent at least once, by whichever process gets to it, and with the same id whenever it is repeated.
What is told when is in `rules.py`, what is told in `messages.py`, the way to people in `channels.py` and
`apprise_channel.py`, what Postgres keeps of it in `ledger.py`, and the thread that does it all in `job.py`.
"""

from __future__ import annotations

from observability.alerts.apprise_channel import AppriseChannel, apprise_channels
from observability.alerts.channels import AlertDeliveryError, Channel, Webhook
from observability.alerts.job import Alerts
from observability.alerts.messages import Message

__all__ = ["Alerts", "Channel", "Webhook", "AppriseChannel", "apprise_channels", "AlertDeliveryError", "Message"]
