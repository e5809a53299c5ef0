"""A process that runs the schedule of alerts until it is killed; see `test_alerts.py`."""

from __future__ import annotations

import sys
import threading

from observability.alerts import Alerts, Webhook

SECRET = "whsec_" + "c2VjcmV0IG9mIHRoZSB0ZXN0cyE="


def main() -> None:
    postgres_uri, url, lease = sys.argv[1:]
    Alerts(postgres_uri, [Webhook(url, secret=SECRET, timeout=60)], interval=0.2, lease=float(lease), digest_hour=0)
    print("runs", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
