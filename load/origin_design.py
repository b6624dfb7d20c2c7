"""The design that the origin documents, built as documented, as a yardstick. `load/harness.py` starts it.

A FastAPI endpoint with a pydantic envelope; the key looked up in the database; rate and quota asked of Redis at the
same time, in a trip each; a validation model per tool, built once; metrics by labels; OpenTelemetry's instrumentation
at 100 %; orjson; and an INSERT per call in a task of its own, through SQLAlchemy's session and its pool of 10 + 10.
Nothing of its code is here. DATABASE_URL, REDIS_URL and OTEL_EXPORTER_OTLP_ENDPOINT say where; prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
import uvicorn
import uvloop
from fastapi import Depends, FastAPI, Request, Response
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel, create_model
from redis.asyncio import ConnectionPool, Redis
from sqlalchemy import Float, String, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.access.keys import digest, split

POOL_SIZE, MAX_OVERFLOW, POOL_TIMEOUT_S, POOL_RECYCLE_S = 10, 10, 30, 3600
REDIS_CONNECTIONS = 50
RATE_PER_S, QUOTA_PER_DAY = 1_000_000, 1_000_000_000
BACKGROUND_MAX = 20_000
"""The design has no bound; without one, a machine that cannot keep up would run out of memory here."""


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "origin_executions"
    execution_id: Mapped[str] = mapped_column(String, primary_key=True)
    tool_id: Mapped[str] = mapped_column(String, index=True)
    agent_id: Mapped[str] = mapped_column(String, index=True)
    status: Mapped[str] = mapped_column(String)
    parameters: Mapped[str] = mapped_column(String)
    result: Mapped[str] = mapped_column(String)
    execution_ms: Mapped[float] = mapped_column(Float)
    created_at: Mapped[str] = mapped_column(String)


class KeyRow(Base):
    """The columns that are asked for of the table that this service keeps its keys in."""

    __tablename__ = "api_keys"
    key_id: Mapped[str] = mapped_column("id", String, primary_key=True)
    secret_sha256: Mapped[str] = mapped_column(String)
    tenant: Mapped[str] = mapped_column(String)
    subject: Mapped[str] = mapped_column(String)


class ExecuteParams(BaseModel):
    tool_id: str
    parameters: dict[str, Any]
    agent_id: str | None = None


class Envelope(BaseModel):
    jsonrpc: str
    method: str
    params: ExecuteParams
    id: int | str | None = None


class Tool:
    """Its validation model is built once, as the origin's list of optimisations has it."""

    def __init__(self, tool_id: str, function: Callable[..., Awaitable[Any]], **parameters: Any) -> None:
        self.tool_id = tool_id
        self.function = function
        self.model: type[BaseModel] = create_model(f"{tool_id}_parameters", **parameters)


async def echo(message: str) -> dict[str, str]:
    return {"message": message}


TOOLS = {"echo": Tool("echo", echo, message=(str, ...))}

EXECUTIONS = Counter("origin_tool_executions_total", "Calls", ["tool_id", "status"])
DURATION = Histogram("origin_tool_execution_duration_seconds", "Seconds", ["tool_id"])
OVERHEAD = Histogram("origin_framework_overhead_seconds", "Seconds", ["tool_id"])
CONCURRENCY = Gauge("origin_tool_execution_concurrency", "Calls that run", ["tool_id"])

engine = create_async_engine(
    os.environ.get("DATABASE_URL", "sqlite+aiosqlite://"),
    **(
        {
            "pool_size": POOL_SIZE,
            "max_overflow": MAX_OVERFLOW,
            "pool_timeout": POOL_TIMEOUT_S,
            "pool_recycle": POOL_RECYCLE_S,
            "pool_pre_ping": True,
        }
        if "postgresql" in os.environ.get("DATABASE_URL", "")
        else {}
    ),
)
sessions = async_sessionmaker(engine, expire_on_commit=False)
redis: Redis = Redis(
    connection_pool=ConnectionPool.from_url(
        os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"), max_connections=REDIS_CONNECTIONS
    )
)
tracer = trace.get_tracer("origin")
background: set[asyncio.Task[None]] = set()
pooled = asyncio.Semaphore(REDIS_CONNECTIONS)
"""redis-py's pool raises when it is empty; the design waits."""


async def session() -> AsyncIterator[AsyncSession]:
    async with sessions() as one:
        yield one


async def caller(request: Request, database: Annotated[AsyncSession, Depends(session)]) -> str:
    """The key's subject, asked of the database."""
    credential = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    key_id, secret = split(credential) or ("", b"")
    with tracer.start_as_current_span("authentication"):
        found = (await database.execute(select(KeyRow).where(KeyRow.key_id == key_id))).scalar_one_or_none()
    if found is None or found.secret_sha256 != digest(secret):
        raise PermissionError
    await database.close()
    return found.subject


async def within_rate(subject: str, tool_id: str) -> bool:
    async with pooled:
        key = f"origin:rate:{subject}:{tool_id}:{int(time.time())}"
        async with redis.pipeline(transaction=True) as pipe:
            pipe.incr(key)
            pipe.expire(key, 2)
            count, _ = await pipe.execute()
        return int(count) <= RATE_PER_S


async def within_quota(subject: str, tool_id: str) -> bool:
    async with pooled:
        key = f"origin:quota:{subject}:{tool_id}:{datetime.now(UTC):%Y%m%d}"
        async with redis.pipeline(transaction=True) as pipe:
            pipe.incr(key)
            pipe.expire(key, 172_800)
            count, _ = await pipe.execute()
        return int(count) <= QUOTA_PER_DAY


async def write_row(row: Row) -> None:
    async with sessions() as one:
        one.add(row)
        await one.commit()


app = FastAPI()


@app.post("/api/v1/jsonrpc")
async def jsonrpc(envelope: Envelope, subject: Annotated[str, Depends(caller)]) -> Response:
    began = time.perf_counter()
    params = envelope.params
    with tracer.start_as_current_span("registry"):
        tool = TOOLS[params.tool_id]
    with tracer.start_as_current_span("checks"):
        allowed = await asyncio.gather(within_rate(subject, tool.tool_id), within_quota(subject, tool.tool_id))
    if not all(allowed):
        return answer({"jsonrpc": "2.0", "id": envelope.id, "error": {"code": -32001, "message": "limited"}})
    CONCURRENCY.labels(tool.tool_id).inc()
    with tracer.start_as_current_span("validation"):
        validated = tool.model.model_validate(params.parameters)
    with tracer.start_as_current_span("execution"):
        started = time.perf_counter()
        result = await tool.function(**validated.model_dump())
        execution_s = time.perf_counter() - started
    CONCURRENCY.labels(tool.tool_id).dec()
    EXECUTIONS.labels(tool.tool_id, "success").inc()
    DURATION.labels(tool.tool_id).observe(execution_s)
    execution = {
        "execution_id": str(uuid.uuid4()),
        "tool_id": tool.tool_id,
        "status": "success",
        "result": result,
        "error": None,
        "execution_time_ms": execution_s * 1e3,
        "timestamp": datetime.now(UTC).isoformat(),
    }
    remember(execution, subject, params.parameters)
    OVERHEAD.labels(tool.tool_id).observe(time.perf_counter() - began - execution_s)
    return answer({"jsonrpc": "2.0", "id": envelope.id, "result": execution})


def answer(document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


def remember(execution: dict[str, Any], subject: str, parameters: dict[str, Any]) -> None:
    """Off the call's path: a task for each row."""
    if len(background) >= BACKGROUND_MAX:
        return
    row = Row(
        execution_id=execution["execution_id"],
        tool_id=execution["tool_id"],
        agent_id=subject,
        status=execution["status"],
        parameters=orjson.dumps(parameters).decode(),
        result=orjson.dumps(execution["result"]).decode(),
        execution_ms=execution["execution_time_ms"],
        created_at=execution["timestamp"],
    )
    task = asyncio.create_task(write_row(row))
    background.add(task)
    task.add_done_callback(background.discard)


def trace_everything() -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
    return provider


async def main() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)  # the keys' table is there already
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(app, loop="uvloop", http="httptools", ws="none", log_level="error", access_log=False)
    print(listener.getsockname()[1], flush=True)
    try:
        await uvicorn.Server(config).serve([listener])
    finally:
        for task in list(background):
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        with contextlib.suppress(Exception):
            await redis.aclose()
        await engine.dispose()


if __name__ == "__main__":
    spans = trace_everything()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    spans.shutdown()
