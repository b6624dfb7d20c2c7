"""The HTTP under OpenTelemetry's exporter, by httpcore, which the egress has loaded anyway.

The library's own way imports requests and what that brings: 5 MB of memory for a POST every five seconds. Knows no
span. Called by the exporter that `span_export` makes, in the batch processor's thread.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import certifi
import httpcore
from opentelemetry.exporter.http.transport._base import BaseHTTPResult, BaseHTTPTransport

PREFIXES = ("OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_")
"""Of OpenTelemetry's variables: what is said of traces goes before what is said of everything."""

OF_REQUESTS = ("_CREDENTIAL_PROVIDER", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Ends of variables' names that are for requests to follow, and variables of its own that name authorities."""

CONNECTION_ERRORS = (httpcore.NetworkError, httpcore.RemoteProtocolError, httpcore.ConnectTimeout)


@dataclass(frozen=True, slots=True)
class _Result(BaseHTTPResult):
    response: httpcore.Response | None = field(default=None, compare=False)

    def content(self) -> bytes:
        return b"" if self.response is None else self.response.content

    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""
        headers = () if self.response is None else self.response.headers
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


class HttpcoreTransport(BaseHTTPTransport):
    """One connection, kept. Certificates as the variables OTEL_EXPORTER_OTLP_[TRACES_]CERTIFICATE, CLIENT_CERTIFICATE
    and CLIENT_KEY name them; OSError or ssl.SSLError where a file cannot be read."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._pool = httpcore.ConnectionPool(ssl_context=_tls(environ), max_connections=1)

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
        data: bytes | None = None,
    ) -> BaseHTTPResult:
        """Send it. `timeout` in seconds, for each wait. What goes wrong is in the result."""
        waits = dict.fromkeys(("connect", "read", "write", "pool"), timeout)
        try:
            sent = {"host": urlsplit(url).netloc, **(headers or {})}
            lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent.items()]
            response = self._pool.request(method, url, headers=lines, content=data, extensions={"timeout": waits})
        except (OSError, httpcore.TimeoutException, *CONNECTION_ERRORS, httpcore.UnsupportedProtocol) as error:
            return _Result(error=error)
        if 300 <= response.status < 400:  # the library takes it for an arrival, and nothing has arrived
            return _Result(reason=f"redirected by {response.status}")
        reason = response.extensions.get("reason_phrase", b"").decode("latin-1")
        return _Result(response.status, reason, response=response)

    def is_connection_error(self, exception: Exception | None) -> bool:
        """Whether to try again is of use: the receiver was not reached, or went away."""
        return isinstance(exception, CONNECTION_ERRORS)

    def close(self) -> None:
        self._pool.close()


class LastAnswer(BaseHTTPTransport):
    """Any transport, and what the receiver answered last."""

    def __init__(self, transport: BaseHTTPTransport) -> None:
        self._transport = transport
        self._result: BaseHTTPResult | None = None

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
        data: bytes | None = None,
    ) -> BaseHTTPResult:
        self._result = self._transport.request(method, url, headers=headers, timeout=timeout, data=data)
        return self._result

    @property
    def protobuf(self) -> bytes:
        """Its body; empty where it was none, or in another format."""
        if self._result is None or "x-protobuf" not in self._result.headers().get("content-type", ""):
            return b""
        return self._result.content()

    def is_connection_error(self, exception: Exception | None) -> bool:
        return self._transport.is_connection_error(exception)

    def close(self) -> None:
        self._transport.close()


def is_able(environ: Mapping[str, str]) -> bool:
    """Whether the variables ask for nothing that requests alone does: a proxy, credentials from elsewhere or in the
    endpoint."""
    if any(value and name.upper().endswith(OF_REQUESTS) for name, value in environ.items()):
        return False
    return "@" not in (_said(environ, "ENDPOINT") or "")


def _tls(environ: Mapping[str, str]) -> ssl.SSLContext:
    if not (_said(environ, "ENDPOINT") or "").lower().startswith("https:"):
        # One without authorities trusts nobody; reading them takes a megabyte that http has no use for.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    named = _said(environ, "CERTIFICATE") or next(filter(None, map(environ.get, BUNDLES)), None)
    is_folder = named is not None and Path(named).is_dir()
    context = ssl.create_default_context(
        cafile=None if is_folder else named or certifi.where(), capath=named if is_folder else None
    )
    certificate = _said(environ, "CLIENT_CERTIFICATE")
    if certificate is not None:
        # Without a password of its own OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, _said(environ, "CLIENT_KEY"), password=b"")
    return context


def _said(environ: Mapping[str, str], name: str) -> str | None:
    return next((value for prefix in PREFIXES if (value := environ.get(prefix + name))), None)
