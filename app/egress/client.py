"""The client: sends, follows redirects, reads, and bounds all of it.

Asks `rules` about every address and gets its connections from `network`; an origin that fails again and again is not
asked for a while. Knows no settings and no tool.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import certifi
import httpcore

from app.breaker import FAILED, SAYS_NOTHING, SUCCEEDED, BreakerTable, Outcome
from app.egress.body import read_body
from app.egress.message import Message, checked_message
from app.egress.network import ConnectionPool
from app.egress.rules import EgressAllow, EgressRules, as_addresses, egress_refused
from app.egress.targets import Address, Origin, QueryValue, Target, invalid_request, parse_target
from app.errors import Overloaded, ToolError, UpstreamFailed
from app.names import Resolver, ThreadedResolver, nobody

REDIRECTS_MAX = 3
RESOLVE_S_MAX = 5.0
"""One attempt of the C library's resolver with its default of 5 s; a second one rarely brings more."""

RESPONSE_BYTES_MAX = 1024 * 1024
"""As sent and as inflated. The default follows MAX_RESULT_BYTES: more could not leave the service anyway."""

FAILING_STATUSES = frozenset({500, 502, 503, 504})
"""Answers that are held against the origin. 501 and 505 are about the request."""

IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
"""RFC 9110, section 9.2.2."""

KEY_HEADER = "idempotency-key"
"""With it the server tells a repeat from another request (draft-ietf-httpapi-idempotency-key-header)."""

BODILESS_STATUSES = frozenset({204, 304})

SLOW_S = 1.0
"""An origin that had less time than this is not to blame for a timeout: the caller chose it."""

SAME_TIME_S = 0.02
"""A tool gives its request what is left of its own time: both end together, and either may come first."""

OriginBreakers = BreakerTable[tuple[str, Origin]]
"""By tenant and origin."""


class Outgoing(Protocol):
    """One request as the trace around it has it: what it carries on, and how it ended."""

    headers: dict[str, str]

    def ended(self, status_code: int | None = None, error: str | None = None) -> None:
        """Called once."""


Trace = Callable[[str, tuple[str, str, int]], Outgoing | None]
"""Asked with the method and the origin of each request."""


def untraced(method: str, origin: tuple[str, str, int]) -> None:
    """Nothing is carried on."""


@dataclass(frozen=True, slots=True)
class EgressResponse:
    """Header names are in lower case, repeated ones joined with a comma. `url` is the last one after redirects."""

    status_code: int
    headers: dict[str, str]
    body: bytes
    url: str


@dataclass(slots=True)
class _Asking:
    """One request of a tool: what bounds all of its hops."""

    first: Target
    bytes_max: int
    trace: Trace
    time: asyncio.Timeout
    in_doubt: bool = field(default=False, init=False)
    """A server may have done what would be done twice by a repeat."""
    connected_at: float = field(default=0.0, init=False)
    """Of the present hop, by the breakers' clock; 0 until there is a connection or an attempt at one."""

    def request_for(self, message: Message, target: Target) -> httpcore.Request:
        request = message.for_target(target)
        if message.method not in IDEMPOTENT_METHODS and KEY_HEADER not in message.headers:
            request.extensions["trace"] = self._noted
        return request

    async def _noted(self, event: str, _: Any) -> None:
        if event == "http11.send_request_headers.started":
            self.in_doubt = True

    def is_over(self) -> bool:
        """Whether the time has run out, or is about to."""
        ends_at = self.time.when()
        return ends_at is not None and asyncio.get_running_loop().time() >= ends_at - SAME_TIME_S


class EgressClient:
    """Shared by all tools. `own_addresses` are host and port of each listening socket of this process.

    `whose` names the tenant that a request is sent for: connections and look-ups of names go to tenants in turn, and
    breakers are kept by tenant and origin, so that nobody closes an origin to others by what they ask of it. `breakers`
    None: there are none.
    """

    def __init__(
        self,
        allow: EgressAllow,
        pool_size: int,
        own_addresses: Iterable[tuple[str, int]] = (),
        *,
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
        user_agent: str = "agentcore-tools",
        trace: Trace = untraced,
        whose: Callable[[], str] = nobody,
        breakers: OriginBreakers | None = None,
    ) -> None:
        self._trace = trace
        self._whose = whose
        self.breakers = breakers
        self._rules = EgressRules(allow, tuple(own_addresses))
        self._resolve = resolver or ThreadedResolver(whose)
        # These authorities alone, no SSL_CERT_FILE: the environment of a service is not a trust store. httpx would make
        # the same context, and takes 2 to 6 MB.
        self.pool = ConnectionPool(pool_size, ssl_context or ssl.create_default_context(cafile=certifi.where()))
        self._defaults = {"accept": "*/*", "user-agent": user_agent}

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, QueryValue] | None = None,
        body: bytes | None = None,
        timeout_s: float,
        response_bytes_max: int = RESPONSE_BYTES_MAX,
    ) -> EgressResponse:
        """Send, follow redirects, read. `timeout_s` bounds all of it together. An error after a POST or PATCH was sent
        without a header Idempotency-Key is `in_doubt`.

        Raises ToolError: EGRESS_INVALID_REQUEST, EGRESS_REFUSED, EGRESS_TIMEOUT, EGRESS_FAILED,
        EGRESS_UPSTREAM_FAILING, EGRESS_RESPONSE_TOO_LARGE or EGRESS_TOO_MANY_REDIRECTS.
        """
        message = checked_message(method, headers or {}, body, self._defaults)
        target = parse_target(url, params)
        trace = untraced if "traceparent" in message.headers else self._trace  # a tool's own trace is the tool's
        asking = _Asking(target, response_bytes_max, trace, asyncio.timeout(timeout_s))
        try:
            return await self._in_time(message, target, asking)
        except ToolError as error:
            error.in_doubt = asking.in_doubt
            raise

    async def _in_time(self, message: Message, target: Target, asking: _Asking) -> EgressResponse:
        try:
            async with asking.time:
                return await self._follow(message, target, asking)
        except (TimeoutError, httpcore.TimeoutException):
            raise _timed_out(target) from None
        except httpcore.LocalProtocolError:
            raise invalid_request("request cannot be written as HTTP/1.1") from None
        except (httpcore.NetworkError, httpcore.RemoteProtocolError) as error:
            raise _failed(error, target) from None

    async def _follow(self, message: Message, target: Target, asking: _Asking) -> EgressResponse:
        for _ in range(REDIRECTS_MAX + 1):
            response = await self._judged_exchange(message, target, asking)
            if not _is_redirect(response):
                return response
            following = _redirect_target(target, response.headers["location"])
            same_origin = following.origin == target.origin
            message, target = message.redirected(response.status_code, same_origin=same_origin), following
        raise ToolError(f"more than {REDIRECTS_MAX} redirects", code="EGRESS_TOO_MANY_REDIRECTS")

    async def _judged_exchange(self, message: Message, target: Target, asking: _Asking) -> EgressResponse:
        """One hop, if the origin's breaker lets it pass, which is told how it went."""
        breakers = self.breakers
        if breakers is None:
            return await self._traced_exchange(message, target, asking)
        key = (self._whose(), target.origin)
        try:
            probe = breakers.enter(key)
        except Overloaded as refusal:
            raise _failing(asking.first, refusal.retry_after_ms) from None
        began_s, asking.connected_at = breakers.clock(), 0.0
        outcome: Outcome = SAYS_NOTHING
        try:
            response = await self._traced_exchange(message, target, asking)
            outcome = FAILED if response.status_code in FAILING_STATUSES else SUCCEEDED
            return response
        except BaseException as error:
            outcome = _outcome(error, asking, breakers.clock())
            raise
        finally:
            breakers.ended(key, began_s, outcome, probe)

    async def _traced_exchange(self, message: Message, target: Target, asking: _Asking) -> EgressResponse:
        outgoing = asking.trace(message.method, target.origin)
        if outgoing is None:
            return await self._exchange(message, target, asking)
        message = replace(message, headers={**message.headers, **outgoing.headers})
        try:
            response = await self._exchange(message, target, asking)
        except BaseException as error:
            outgoing.ended(error=error.code if isinstance(error, ToolError) else type(error).__name__)
            raise
        outgoing.ended(response.status_code)
        return response

    async def _exchange(self, message: Message, target: Target, asking: _Asking) -> EgressResponse:
        """One hop. The body of a redirect is not read; its connection is closed then."""
        addresses = await self._checked_addresses(target, asking)
        async with self.pool.connection(target, addresses, self._whose()) as connection:
            if self.breakers is not None:
                asking.connected_at = self.breakers.clock()
            answer = await connection.handle_async_request(asking.request_for(message, target))
            try:
                response = EgressResponse(answer.status, _joined_headers(answer.headers), b"", target.url)
                if _is_redirect(response):
                    return response
                assert isinstance(answer.stream, AsyncIterable)
                # what headers say there is about a body that is not sent (RFC 9110, sections 8.6 and 15.4.5)
                bodiless = message.method == "HEAD" or answer.status in BODILESS_STATUSES
                described = {} if bodiless else response.headers
                return replace(response, body=await read_body(answer.stream, described, asking.bytes_max))
            finally:
                await answer.aclose()

    async def _checked_addresses(self, target: Target, asking: _Asking) -> tuple[Address, ...]:
        """Every address of the target's host. All of them may be connected to, or none is."""
        addresses = (target.address,) if target.address else await self._resolved(target, asking)
        if any(self._rules.refuses(target.host, address, target.port) for address in addresses):
            raise egress_refused()
        return addresses

    async def _resolved(self, target: Target, asking: _Asking) -> tuple[Address, ...]:
        try:
            async with asyncio.timeout(RESOLVE_S_MAX):
                found = await self._resolve(target.host, target.port)
        except TimeoutError:
            raise
        except OSError:
            found = ()
        if not found:
            raise UpstreamFailed("host name has no address", asking.first.host, code="EGRESS_FAILED", retryable=True)
        return as_addresses(found)

    async def aclose(self) -> None:
        await self.pool.aclose()


def _joined_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return {name: ", ".join(several) for name, several in values.items()}


def _is_redirect(response: EgressResponse) -> bool:
    return response.status_code in (301, 302, 303, 307, 308) and "location" in response.headers


def _redirect_target(target: Target, location: str) -> Target:
    try:
        return target.joined(location.encode("latin-1").decode("utf-8"))
    except (ToolError, ValueError):  # not the caller's mistake, and nothing to tell about where it led
        raise egress_refused() from None


def _outcome(error: BaseException, asking: _Asking, now: float) -> Outcome:
    """What the end of a hop says of its origin. Nothing: what was refused or too large, a certificate that will not
    be better in a while, a wait for the resolver or for a connection of the pool, and whoever did not want to wait."""
    if isinstance(error, UpstreamFailed | httpcore.RemoteProtocolError):
        return FAILED
    if isinstance(error, httpcore.NetworkError):
        return SAYS_NOTHING if _is_untrusted(error) else FAILED
    if isinstance(error, httpcore.TimeoutException) or (isinstance(error, asyncio.CancelledError) and asking.is_over()):
        waited = asking.connected_at and now - asking.connected_at >= SLOW_S
        return FAILED if waited else SAYS_NOTHING
    return SAYS_NOTHING


def _is_untrusted(error: Exception) -> bool:
    return isinstance(error.__cause__, ssl.SSLCertVerificationError)


def _timed_out(first: Target) -> ToolError:
    return UpstreamFailed("no complete response in time", first.host, code="EGRESS_TIMEOUT", retryable=True)


def _failed(error: Exception, first: Target) -> ToolError:
    if _is_untrusted(error):
        return ToolError("certificate of the server could not be verified", code="EGRESS_FAILED")
    return UpstreamFailed("connection failed", first.host, code="EGRESS_FAILED", retryable=True)


def _failing(first: Target, retry_after_ms: int | None) -> ToolError:
    return UpstreamFailed(
        "upstream is failing: it was not asked again yet",
        first.host,
        code="EGRESS_UPSTREAM_FAILING",
        asked=False,
        retryable=True,
        retry_after_ms=retry_after_ms,
    )
