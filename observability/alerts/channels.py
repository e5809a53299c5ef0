"""The way of a message to people: what a channel is, and the webhook.

The webhook is a POST with a CloudEvent, signed as Standard Webhooks asks for (https://www.standardwebhooks.com):
HMAC-SHA256 over id, time and body. It uses `urllib`: one small request that must not follow redirects, read an answer
or pool connections needs no client library, and the alert about a broken installation should depend on little of it.
Not here: repeating what has failed (`job.py`), mail and chat services (`apprise_channel.py`).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import http.client
import socket
import ssl
import threading
import time
import urllib.request
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit

from checkpointer.errors import CheckpointerError, ConfigurationError

if TYPE_CHECKING:
    from observability.alerts.messages import Message

_SECRET_PREFIX = "whsec_"
_LONGEST_WAIT = 3_600.0
# Standard Webhooks and RFC 9110: these pass; any other answer of the classes 3xx and 4xx would come again.
_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


class AlertDeliveryError(CheckpointerError):
    """A channel could not deliver a message.

    Args:
        reason: Why, in a few words without addresses or secrets: it is stored and logged.
        retryable: Whether it may work later.
        retry_after: Seconds that the other side asks to be left alone, if it did.
    """

    def __init__(self, reason: str, *, retryable: bool = True, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retryable = retryable
        self.retry_after = retry_after


class Channel(Protocol):
    """A way to people.

    Attributes:
        name: Unique among the channels, and the same in all processes: what has it is remembered under this name.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - said above

    def send(self, message: Message) -> None:
        """Deliver a message, or raise `AlertDeliveryError`; called from one thread, and may block for seconds."""


class Webhook:
    """A channel that POSTs to a URL. Proxies of the environment are used; redirects are not followed.

    Args:
        url: An `http` or `https` URL; user and password in it become a Basic `Authorization` header.
        secret: Signs the requests: `whsec_` and a key in base64, or any other text. Without one they are unsigned.
        timeout: Seconds for the whole request.
        name: See `Channel`; to be chosen if there are several.

    Raises:
        ConfigurationError: The URL or the secret cannot be used; neither is quoted.
    """

    def __init__(self, url: str, *, secret: str | None = None, timeout: float = 10.0, name: str = "webhook") -> None:
        self.name = name
        self._url, self._authorization = _check_url(url)
        self._key = None if secret is None else _key(secret)
        self._timeout = timeout

    def send(self, message: Message) -> None:
        """Deliver a message; any answer of the class 2xx will do, and its body is not read.

        Raises:
            AlertDeliveryError: There was another answer, or none in time.
        """
        body = message.body.encode()
        headers = {
            "Content-Type": "application/cloudevents+json; charset=utf-8",
            "User-Agent": "langgraph-checkpoint-buffered",
            "Webhook-Id": str(message.id),
            "Webhook-Timestamp": str(int(time.time())),
        }
        if self._key is not None:
            headers["Webhook-Signature"] = sign(self._key, headers["Webhook-Id"], headers["Webhook-Timestamp"], body)
        if self._authorization is not None:
            headers["Authorization"] = self._authorization
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        try:
            _post(request, self._timeout)
        except HTTPError as exc:
            with exc:
                raise _refusal(exc.code, exc.headers.get("Retry-After")) from None
        except URLError as exc:
            cause = exc.reason if isinstance(exc.reason, BaseException) else exc
            raise AlertDeliveryError(f"no answer ({type(cause).__name__})") from None
        # The cause is left out: messages of these can quote the address, and with it a token.
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise AlertDeliveryError(f"no answer ({type(exc).__name__})") from None


def sign(key: bytes, identity: str, timestamp: str, body: bytes) -> str:
    """Return the value of the header `Webhook-Signature`."""
    digest = hmac.digest(key, f"{identity}.{timestamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


def _check_url(url: str) -> tuple[str, str | None]:
    """Return the URL without credentials, and the header that they make."""
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except (ValueError, UnicodeError):
        parts, port, host = urlsplit(""), None, ""
    if parts.scheme not in ("http", "https") or not host or any(char <= " " or char == "\x7f" for char in url):
        raise ConfigurationError("the URL of the alert webhook has to look like https://host/path")
    place = (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")
    bare = urlunsplit((parts.scheme, place, parts.path or "/", parts.query, ""))
    try:
        bare.encode("ascii")
    except UnicodeError:
        raise ConfigurationError("the URL of the alert webhook has to be percent-encoded: it is not ASCII") from None
    if parts.username is None:
        return bare, None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return bare, "Basic " + base64.b64encode(pair.encode()).decode()


def _key(secret: str) -> bytes:
    if not secret.startswith(_SECRET_PREFIX):
        key = secret.encode("utf-8", "surrogateescape")
    else:
        try:
            key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            raise ConfigurationError("the secret of the alert webhook begins with whsec_, but is not base64") from None
    if not key:
        raise ConfigurationError("the secret of the alert webhook is empty")
    return key


def _post(request: urllib.request.Request, timeout: float) -> None:
    """Send a request and take the head of its answer, within so many seconds.

    `urllib` limits each wait for the socket and not their sum, so a server that trickles is cut off from here.
    """
    open_now: list[http.client.HTTPConnection] = []
    is_over = threading.Event()

    def cut() -> None:
        is_over.set()
        for connection in open_now:
            with contextlib.suppress(Exception):
                connection.sock.shutdown(socket.SHUT_RDWR)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(open_now),
        _Https(open_now),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    timer = threading.Timer(timeout, cut)
    timer.daemon = True
    timer.start()
    try:
        with opener.open(request, timeout=timeout):
            # An answer that was cut off can look like a whole one.
            if is_over.is_set():
                raise TimeoutError
    finally:
        timer.cancel()


class _Http(urllib.request.HTTPHandler):
    """Keeps the connection at hand, so that it can be cut."""

    def __init__(self, open_now: list[http.client.HTTPConnection]) -> None:
        super().__init__()
        self._open_now = open_now

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect, req)

    def _connect(self, host: str, **settings: Any) -> http.client.HTTPConnection:
        self._open_now.append(http.client.HTTPConnection(host, **settings))
        return self._open_now[-1]


class _Https(urllib.request.HTTPSHandler):
    """The same with TLS, and the system's certificates."""

    def __init__(self, open_now: list[http.client.HTTPConnection]) -> None:
        super().__init__()
        self._open_now = open_now
        self._tls = ssl.create_default_context()

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect, req)

    def _connect(self, host: str, **settings: Any) -> http.client.HTTPConnection:
        self._open_now.append(http.client.HTTPSConnection(host, context=self._tls, **settings))
        return self._open_now[-1]


def _refusal(status: int, retry_after: str | None) -> AlertDeliveryError:
    reason = f"HTTP {status}"
    if 300 <= status < 400:
        reason += ", and redirects are not followed"
    passes = status in _PASSING or status >= 500
    return AlertDeliveryError(reason, retryable=passes, retry_after=_seconds(retry_after) if passes else None)


def _seconds(retry_after: str | None) -> float | None:
    """Read the header `Retry-After`: seconds or a date."""
    text = (retry_after or "").strip()
    if not text:
        return None
    try:
        if text.isascii() and text.isdigit():
            seconds = float(text[:9])
        else:
            when = parsedate_to_datetime(text)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            seconds = (when - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)
