"""The ASGI application: who answers which path, top to bottom.

First the guard against browsers and DNS rebinding, then the doors of calls, which ask for a credential themselves, then
the gate that does, then FastAPI for the rest of REST, documents and ops.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlsplit

import orjson
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import Info
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app import __version__
from app.errors import PermissionDenied
from app.executor.plans import run_bounded
from app.service import Service
from app.settings import http_url, is_loopback
from app.telemetry.http_requests import HttpRequests
from app.transport import documents, ops, rest
from app.transport.admin import CacheRoutes, KeyRoutes
from app.transport.door import CLOSE, Door, Receive, Scope, Send, json_headers, respond
from app.transport.executions import ExecutionRoutes
from app.transport.gate import Gate, open_paths
from app.transport.jsonrpc import Dispatcher
from app.transport.mcp import MCP_PATH, McpDoor, ResourceDoor
from app.transport.mcp_dispatcher import McpDispatcher
from app.transport.mcp_methods import McpMethods
from app.transport.mcp_resource import METADATA_PATHS, ProtectedResource
from app.transport.methods import Methods
from app.transport.openrpc import openrpc_document
from app.transport.rest_door import RestDoor, tool_id_in
from app.transport.rpc import RPC_PATH, JsonRpcDoor

HOSTS_REMEMBERED_MAX = 64

ANSWER_RESULTS_MAX = 16
"""Results of MAX_RESULT_BYTES that one answer has room for, however many calls the request made."""
DEFAULT_PORTS = {"http": 80, "https": 443}


def create_app(service: Service, *, host: str = "127.0.0.1", port: int = 8001) -> Guard:
    """The whole application over an open service. `host` and `port` are what the server is bound to."""
    settings = service.settings
    answer_bytes_max = ANSWER_RESULTS_MAX * settings.max_result_bytes
    methods = Methods(
        service.executor,
        service.registry,
        service.history,
        service.metrics,
        settings.max_batch_size,
        answer_bytes_max,
    )
    methods.discovery = orjson.dumps(openrpc_document(methods.table(), settings.public_url or http_url(host, port)))
    access, count_error = service.access, service.metrics.count_error
    room = service.admission.store.room
    dispatcher = Dispatcher(methods.methods(), settings.max_batch_size, answer_bytes_max, count_error, room)
    authentication = service.metrics.stages["authentication"]
    bounds = settings.max_request_bytes, settings.request_read_timeout_s
    service.tracing.listens_at({"server.address": host, **({"server.port": port} if port else {})})
    shared = access, authentication, count_error, *bounds, service.tracing
    door = JsonRpcDoor(dispatcher, *shared)
    resource = ProtectedResource(settings.jwt_issuer, settings.public_url)
    mcp = McpDoor(create_mcp_dispatcher(service), resource, *shared)
    fastapi = create_fastapi(service, methods)
    doors = Doors(
        {RPC_PATH: door, MCP_PATH: mcp},
        RestDoor(methods, service.metrics.http_requests, *shared),
        dict.fromkeys(METADATA_PATHS, ResourceDoor(resource)),
        Gate(fastapi, access, authentication, open_paths(fastapi.routes), count_error),
    )
    inner: ASGIApp = doors
    if settings.cors_allow_origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=settings.cors_allow_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[
                "WWW-Authenticate",
                "Retry-After",
                "RateLimit-Limit",
                "RateLimit-Remaining",
                "RateLimit-Reset",
            ],
        )
    own = (origin_of(settings.public_url),) if settings.public_url else ()
    return Guard(inner, (*settings.cors_allow_origins, *own), doors.at, loopback_only=is_loopback(host))


def create_mcp_dispatcher(service: Service) -> McpDispatcher:
    """MCP over the same executor and registry."""
    settings = service.settings
    methods = McpMethods(
        service.executor,
        service.registry,
        service.metrics,
        cache_answers=settings.enable_registry_cache,
        tracing=service.tracing,
    )
    return McpDispatcher(
        methods,
        settings.max_batch_size,
        ANSWER_RESULTS_MAX * settings.max_result_bytes,
        run_bounded,
        service.metrics.count_error,
        tolerate_mismatch=settings.mcp_tolerate_header_mismatch,
    )


def origin_of(url: str) -> str:
    """The `Origin` that a browser sends from this URL: no path, and no port where it is the scheme's own."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, DEFAULT_PORTS[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def create_fastapi(service: Service, methods: Methods) -> FastAPI:
    """REST, ops and the documents."""
    app = FastAPI(
        title="AgentCore Tools",
        version=__version__,
        summary="Executes tools for AI agents.",
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    app.include_router(ops.router(service))
    rest.mount(app, service.registry, methods, service.metrics.count_error)
    app.include_router(ExecutionRoutes(methods, service.history).router())
    settings = service.settings
    bounds = settings.max_request_bytes, settings.request_read_timeout_s
    app.include_router(KeyRoutes(service.keys, service.access, *bounds).router())
    app.include_router(CacheRoutes(service.registry, service.forget_results).router())
    documents.mount(app, methods.table(), settings.public_url, always_asks=service.access.always_asks)
    count_requests(app, service.metrics.http_requests, service.metrics.registry)
    service.tracing.instrument(app, OWN_PATHS)
    return app


NOT_REST = r"^/(?!api/)"
OWN_PATHS = "/livez,/readyz,/metrics,/docs,/openapi.json,/.well-known/"
"""Patterns of paths without a span: nobody traces a probe."""


def count_requests(app: FastAPI, requests: HttpRequests, registry: CollectorRegistry) -> None:
    """`http_*` of the REST routes, by route. What no route answers is one series, whatever its path was."""

    def observe(info: Info) -> None:
        answered = {} if info.response is None else info.response.headers
        requests.observe(
            info.modified_handler,
            info.method,
            info.modified_status,
            info.modified_duration,
            int(info.request.headers.get("content-length", 0)),
            int(answered.get("content-length", 0)),
        )

    Instrumentator(excluded_handlers=[NOT_REST], registry=registry).add(observe).instrument(app)


class Doors:
    """Paths with a door of their own go to it, everything else through the gate to FastAPI."""

    def __init__(self, doors: Mapping[str, Door], execute: Door, documents: Mapping[str, ASGIApp], rest: Gate) -> None:
        self._doors = doors
        self._execute = execute
        self._documents = documents
        self._rest = rest

    def at(self, path: str) -> Door | None:
        return self._doors.get(path) or (self._execute if tool_id_in(path) else None)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}  # the server itself leaves out the body of an answer to HEAD
            path = scope["path"]
            door = self.at(path) or self._documents.get(path)
            if door is not None:
                return door(scope, receive, send)
        return self._rest(scope, receive, send)


class Guard:
    """Keeps web pages out: a foreign `Origin` is refused, and on loopback a `Host` that is not loopback, for a page
    can point its own name at 127.0.0.1 (DNS rebinding)."""

    def __init__(
        self, inner: ASGIApp, origins: tuple[str, ...], door_at: Callable[[str], Door | None], *, loopback_only: bool
    ) -> None:
        self._inner = inner
        self.door_at = door_at
        """By path: what the protocol lane may answer in our place, for requests that it knows we let through."""
        self._origins = frozenset(origins)
        self._any_origin = "*" in origins
        self._loopback_only = loopback_only
        self._good_hosts: set[bytes] = set()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            host, origin = b"", None
            for name, value in scope["headers"]:
                if name == b"host":
                    host = value
                elif name == b"origin":
                    origin = value if origin is None else b"null"  # a browser sends one
            if not self.is_good_host(host):
                return _forbid(send, "Host is not allowed: this service is bound to loopback")
            if origin is not None and not self._is_allowed(origin.decode("latin-1"), scope["scheme"], host):
                return _forbid(send, "Origin is not allowed; CORS_ALLOW_ORIGINS names the ones that are")
            if origin is not None:
                scope.pop("extensions", None)  # a page's answer needs the headers that CORSMiddleware puts into `send`
        return self._inner(scope, receive, send)

    def is_good_host(self, host: bytes) -> bool:
        """Whether a request for this host may come in, as far as it goes for the host."""
        return not self._loopback_only or host in self._good_hosts or self._is_loopback(host)

    def _is_loopback(self, host: bytes) -> bool:
        try:
            name = urlsplit("//" + host.decode("latin-1")).hostname if host else "localhost"
        except ValueError:  # brackets around what is no address
            return False
        good = name is not None and is_loopback(name)
        if good and len(self._good_hosts) < HOSTS_REMEMBERED_MAX:
            self._good_hosts.add(host)
        return good

    def _is_allowed(self, origin: str, scheme: str, host: bytes) -> bool:
        own = f"{scheme}://{host.decode('latin-1')}"
        return self._any_origin or origin in self._origins or origin.lower() == own.lower()


async def _forbid(send: Send, message: str) -> None:
    body = orjson.dumps({"error": PermissionDenied(message).as_error()})
    await respond(send, 403, [*json_headers(body), CLOSE], body)
