"""What operators and probes ask: /livez, /readyz, /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from app.service import Phase, Service
from app.transport.gate import open_to_all
from app.transport.openapi import refusals

if TYPE_CHECKING:
    from app.access.jwks import FixedKey, KeySet  # loaded where there are tokens alone


def router(service: Service) -> APIRouter:
    """Routes over an open service; none needs a credential."""
    routes = APIRouter(tags=["ops"], responses=dict(refusals([403])))

    @routes.get(
        "/livez", response_class=PlainTextResponse, operation_id="getLiveness", summary="Whether the event loop turns"
    )
    @open_to_all
    async def livez() -> Response:  # of `str` FastAPI would make a model, and import pydantic's version 1 for that
        return PlainTextResponse("ok\n")

    @routes.get(
        "/readyz",
        response_class=PlainTextResponse,
        operation_id="getReadiness",
        summary="Whether to send calls here, with a line per dependency",
        responses={
            503: {
                "description": "Starting, draining, or nobody can be let in",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            }
        },
    )
    @open_to_all
    async def readyz() -> Response:
        ready = service.lifecycle.phase is Phase.SERVING and not service.access.lets_nobody_in
        return PlainTextResponse("".join(f"{line}\n" for line in readiness(service)), 200 if ready else 503)

    @routes.get(
        "/metrics",
        response_class=PlainTextResponse,
        operation_id="getMetrics",
        summary="Prometheus text or OpenMetrics, by Accept",
        responses={200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}}},
    )
    @open_to_all
    async def metrics(request: Request) -> Response:
        text, content_type = await service.scraper.scrape(request.headers.get("accept", ""))
        return Response(text, media_type=content_type)

    return routes


def readiness(service: Service) -> Iterator[str]:
    """One line for the process and one for each thing that it needs."""
    yield f"service: {service.lifecycle.phase.value}"
    yield f"authentication: {'off' if service.access.is_off else 'on'}"
    yield f"database: {database_state(service)}"
    if service.access.token_keys is not None:
        yield f"tokens: {token_state(service.access.token_keys)}"
    yield f"limits: {'up' if service.admission.store.up else 'Redis away, every policy has its own answer'}"
    if service.log is None:
        yield "log: off"
    else:
        yield f"log: {'; '.join(service.log.problems) or 'up'}"
    yield f"tools: {len(service.registry)} registered"
    for source in dict.fromkeys(problem.source for problem in service.load_problems):
        yield f"problem with tools from {source}: the log says why"


def database_state(service: Service) -> str:
    """Whether keys can be read, and what it means when they cannot. Not ready only when nobody can be let in: a replica
    that knows keys serves them on."""
    access = service.access
    if access.away_s is None:
        return "up"
    meaning = "no key is known" if access.lets_nobody_in else "known keys stay good"
    if access.lacks_tables:
        return f"its tables are missing or old, run agentcore-tools migrate; {meaning}"
    return f"away for {access.away_s:.0f} s, {meaning}"


def token_state(keys: KeySet | FixedKey) -> str:
    """Whether the keys of tokens can be read, and what it means when they cannot."""
    if keys.problem is None:
        return "up"
    meaning = "known ones stay good" if keys.usable else "none is known"
    return f"keys cannot be read; {meaning}; see JWT_JWKS and the log"
