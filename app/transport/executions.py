"""The log for callers: pages, one row, and everything as a stream, each of the caller's own tenant.

Owns the REST routes under /api/v1/executions and what they say of themselves. Knows no SQL.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Send

from app.errors import DependencyUnavailable, MethodNotFound
from app.execution_log.history import ExecutionHistory
from app.transport import shapes
from app.transport.calling import SCOPE_HISTORY
from app.transport.gate import caller_with
from app.transport.methods import Methods, filters_of, tenant_seen
from app.transport.openapi import Operation, query_parameters, reference, response
from app.transport.rest import read_query
from app.transport.shapes import NoParams

logger = logging.getLogger("app.transport")

REFUSALS = (403, 414, 422, 500, 503)


class ExecutionRoutes:
    """The endpoints under /api/v1/executions."""

    def __init__(self, methods: Methods, history: ExecutionHistory) -> None:
        self._methods = methods
        self._history = history

    def router(self) -> APIRouter:
        routes = APIRouter(prefix="/api/v1/executions", tags=["executions"], default_response_class=Response)
        routes.add_api_route("", self.listing, methods=["GET"], **LIST_EXECUTIONS.described(REFUSALS))
        routes.add_api_route("/export", self.export, methods=["GET"], **EXPORT_EXECUTIONS.described(REFUSALS))
        routes.add_api_route("/{execution_id}", self.one, methods=["GET"], **GET_EXECUTION.described((*REFUSALS, 404)))
        return routes

    async def listing(self, request: Request) -> Response:
        caller = caller_with(request, SCOPE_HISTORY)
        asked = read_query(request, shapes.HistoryPage)
        return Response(await self._methods.history_page(caller, asked), media_type="application/json")

    async def one(self, request: Request) -> Response:
        caller = caller_with(request, SCOPE_HISTORY)
        read_query(request, NoParams)
        row = await self._history.one(tenant_seen(caller), request.path_params["execution_id"])
        if row is None:  # another tenant's looks the same
            raise MethodNotFound("No such execution; its row may not be written yet")
        return Response(row, media_type="application/json")

    async def export(self, request: Request) -> Response:
        caller = caller_with(request, SCOPE_HISTORY)
        asked = read_query(request, shapes.ExportedExecutions)
        pieces = self._history.export(tenant_seen(caller), filters_of(asked), asked.limit, asked.cursor)
        first = await anext(pieces, b"")  # what is wrong is said by status, as long as nothing was sent
        return _Export(_with_first(first, pieces), media_type="application/x-ndjson")


class _Export(StreamingResponse):
    """Has no end where the database went away meanwhile: uvicorn closes the connection then, which is how a client of
    chunks learns that some are missing. An exception would do the same, with a traceback for each client."""

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except DependencyUnavailable as error:
            logger.warning("export cut off", extra={"reason": str(error)})


async def _with_first(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


# What the routes say of themselves

_FILTERS = {"tool_id": "echo", "status": "success", "since": "2026-11-20T00:00:00Z"}

LIST_EXECUTIONS = Operation(
    "listExecutions",
    "Executions of your tenant, newest first",
    "A row is there a moment after its answer. An admin sees every tenant's.",
    response(
        "One page", reference("ExecutionPage"), {"page": {"executions": [shapes.LOGGED_EXAMPLE], "next_cursor": None}}
    ),
    {"parameters": query_parameters(shapes.HistoryPage, {**_FILTERS, "limit": 50})},
)
GET_EXECUTION = Operation(
    "getExecution",
    "One execution",
    "Another tenant's looks like one that is not there.",
    response("The row", reference("LoggedExecution"), {"row": shapes.LOGGED_EXAMPLE}),
    {
        "parameters": [
            {
                "name": "execution_id",
                "in": "path",
                "required": True,
                "description": "As the answer of the call gave it",
                "schema": {"type": "string", "format": "uuid"},
            }
        ]
    },
)
EXPORT_EXECUTIONS = Operation(
    "exportExecutions",
    "Every execution of your tenant as a stream",
    "NDJSON: one row a line, newest first, read in pieces while it is sent. One that is cut off lacks the end of its "
    "chunks: ask again with the last execution_id as cursor.",
    {
        "description": "The rows",
        "content": {"application/x-ndjson": {"schema": reference("LoggedExecution")}},
    },
    {"parameters": query_parameters(shapes.ExportedExecutions, _FILTERS)},
)
