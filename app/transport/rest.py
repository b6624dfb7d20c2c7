"""REST: discovery, over the same registry as the JSON-RPC door; calls have a door of their own, `rest_door.py`.

Owns how a request's query and body are read and how a refusal becomes an HTTP status. Answers are bytes that the
registry and the methods built; FastAPI routes them and documents them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from app.errors import DRAINING, InternalError, InvalidParams, InvalidRequest, MethodNotFound, ToolServiceError
from app.tools.exports import export
from app.tools.registry import Registry, ToolFilter
from app.tools.schema import violations
from app.transport import openapi
from app.transport.allowance import limit_headers
from app.transport.calling import SCOPE_READ
from app.transport.gate import caller_with
from app.transport.methods import Methods
from app.transport.shapes import ExportQuery, NoParams, Params, ToolsQuery

P = TypeVar("P", bound=Params)
M = TypeVar("M", bound=BaseModel)

REPEATABLE = frozenset({"tag"})
"""Query parameters that are lists."""

READ_REFUSALS = (403, 414, 422, 500)


def mount(app: FastAPI, registry: Registry, methods: Methods, count_error: Callable[[str], None]) -> None:
    """Add the routes, and the one shape of every error of this application."""
    answer_errors(app, count_error)
    tools = ToolRoutes(registry, methods)
    app.include_router(tools.router())
    limits = APIRouter(prefix="/api/v1/limits", tags=["limits"], default_response_class=Response)
    described = openapi.GET_LIMITS.described((*READ_REFUSALS, 404, 503))
    limits.add_api_route("/{tool_id}", tools.limits, methods=["GET"], **described)
    app.include_router(limits)


class ToolRoutes:
    """The endpoints under /api/v1/tools, and what is left of a tool's limits."""

    def __init__(self, registry: Registry, methods: Methods) -> None:
        self._registry = registry
        self._methods = methods

    def router(self) -> APIRouter:
        routes = APIRouter(prefix="/api/v1/tools", tags=["tools"], default_response_class=Response)
        routes.add_api_route("", self.listing, methods=["GET"], **openapi.LIST_TOOLS.described(READ_REFUSALS))
        routes.add_api_route("/export", self.export, methods=["GET"], **openapi.EXPORT_TOOLS.described(READ_REFUSALS))
        routes.add_api_route(
            "/{tool_id}", self.detail, methods=["GET"], **openapi.GET_TOOL.described((*READ_REFUSALS, 404))
        )
        return routes

    async def listing(self, request: Request) -> Response:
        caller = caller_with(request, SCOPE_READ)
        asked = read_query(request, ToolsQuery)
        wanted = ToolFilter(asked.category, tuple(asked.tag or ()))
        if asked.query is None or not asked.query.strip():
            return _json(self._registry.page(wanted, caller, asked.limit, asked.cursor))
        if asked.cursor is not None:
            raise InvalidParams.at("cursor", "A search has one page; leave out cursor or query")
        found = self._registry.search(asked.query, wanted, caller, asked.limit)
        return _json(found[:-1] + b',"next_cursor":null}')

    async def export(self, request: Request) -> Response:
        caller = caller_with(request, SCOPE_READ)
        asked = read_query(request, ExportQuery)
        wanted = ToolFilter(asked.category, tuple(asked.tag or ()))
        exported = export(self._registry.visible(wanted, caller), asked.format)
        return _json(orjson.dumps(exported.as_dict(asked.format)))

    async def detail(self, request: Request) -> Response:
        caller = caller_with(request, SCOPE_READ)
        read_query(request, NoParams)
        return _json(self._registry.detail(request.path_params["tool_id"], caller))

    async def limits(self, request: Request) -> Response:
        caller = caller_with(request, SCOPE_READ)
        read_query(request, NoParams)
        return _json(await self._methods.limit_status(caller, request.path_params["tool_id"]))


def read_query(request: Request, shape: type[P]) -> P:
    """The query as its shape. Unknown names are refused, and repeated ones where the shape has no list."""
    values: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name in REPEATABLE:
            values.setdefault(name, []).append(value)
        elif name in values and name in shape.model_fields:
            raise InvalidParams.at(name, "Given more than once", "repeated")
        else:
            values[name] = value
    if not _WHOLE.fullmatch(values.get("limit", "0")):  # pydantic would take 1_0, 1.0 and blanks around it
        raise InvalidParams.at("limit", "must be a whole number", "int_parsing")
    return validated(shape, values, strict=False)


_WHOLE = re.compile("-?[0-9]+")


def validated(shape: type[M], value: Any, *, strict: bool) -> M:
    """The value as its shape. Raises InvalidParams."""
    try:
        return shape.model_validate(value, strict=strict)
    except ValidationError as error:
        raise InvalidParams("Invalid parameters; /openapi.json shows the schema", violations(error)) from None


def _json(written: bytes) -> Response:
    return Response(written, media_type="application/json")


def answer_errors(app: FastAPI, count_error: Callable[[str], None]) -> None:
    """Whatever goes wrong in this application, the answer is `{"error": {code, message, data}}`."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ToolServiceError)
        if error.execution_id is None:
            count_error(error.kind.error_type)  # one with an id was counted by the executor
        return error_response(error)

    async def crashed(request: Request, error: Exception) -> Response:
        count_error(InternalError.kind.error_type)
        return error_response(InternalError())  # the server logs the traceback

    app.add_exception_handler(ToolServiceError, refused)
    app.add_exception_handler(HTTPException, _unroutable)
    app.add_exception_handler(Exception, crashed)


async def _unroutable(request: Request, error: Exception) -> Response:
    """No route for the path, or none for the method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(MethodNotFound("No such path; /openapi.json lists what there is"))
    refusal = wrong_method() if error.status_code == 405 else InvalidRequest(str(error.detail))
    refusal.http_status = error.status_code
    response = error_response(refusal)
    if error.status_code == 405:
        response.headers["Allow"] = ", ".join(sorted(_methods_of(request)))
    return response


def wrong_method() -> InvalidRequest:
    """405, whose `Allow` says which methods there are."""
    refusal = InvalidRequest("No such method for this path; /openapi.json lists what there is")
    refusal.http_status = 405
    return refusal


def _methods_of(request: Request) -> set[str]:
    """Of every route of this path: the router names only those of the first."""
    methods: set[str] = set()
    for context in iter_route_contexts(request.app.routes):
        if context.path is not None and compile_path(context.path)[0].match(request.scope["path"]):
            methods |= context.methods or set()
    return methods | {"HEAD"} if "GET" in methods else methods


def error_response(error: ToolServiceError) -> Response:
    """A refusal with the HTTP status of its kind and, where it is known, when to come back and what is left."""
    headers = {"Connection": "close"} if error.kind is DRAINING or error.http_status in (408, 413) else {}
    response = Response(orjson.dumps({"error": error.as_error()}), error.http_status, headers, "application/json")
    response.raw_headers.extend(limit_headers(error.allowance, error.retry_after_ms))
    return response
