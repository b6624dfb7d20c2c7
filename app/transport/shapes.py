"""What crosses the wire, as pydantic models: params of the methods, and the shapes that the API documents publish.

Params are validated with these; results are only described by them, for they are written as bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from app.calls import Status
from app.tools.registry import LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX, SEARCH_LIMIT_DEFAULT, SEARCH_LIMIT_MAX

LABEL_CHARACTERS_MAX = 256
PLAN_CONCURRENCY_MAX = 100

Label = Annotated[str, Field(max_length=LABEL_CHARACTERS_MAX)]
Names = Annotated[list[Label], Field(max_length=20)]
Concurrency = Annotated[int, Field(ge=1, le=PLAN_CONCURRENCY_MAX)]
ToolId = Annotated[str, Field(description="Id of the tool, as tools.list gives it", max_length=64)]


class Params(BaseModel):
    """Params of a method: unknown names are refused."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class NoParams(Params):
    pass


class ListParams(Params):
    category: Label | None = Field(None, description="Only tools of this category")
    capabilities: Names | None = Field(None, description="Only tools that have all of these")
    tags: Names | None = Field(None, description="Only tools that have any of these")
    limit: Annotated[int, Field(ge=1, le=LIST_LIMIT_MAX)] | None = Field(
        None, description=f"Tools a page; {LIST_LIMIT_DEFAULT} when not given"
    )
    cursor: Label | None = Field(None, description="next_cursor of the page before")


class GetParams(Params):
    tool_id: ToolId


class SearchParams(Params):
    name_query: Label | None = Field(None, description="Words to look for in id, name, description and tags")
    category: Label | None = Field(None, description="Only tools of this category")
    capabilities: Names | None = Field(None, description="Only tools that have all of these")
    tags: Names | None = Field(None, description="Only tools that have any of these")
    limit: Annotated[int, Field(ge=1, le=SEARCH_LIMIT_MAX)] | None = Field(
        None, description=f"Tools in the answer; {SEARCH_LIMIT_DEFAULT} when not given"
    )


class ExecutionContext(Params):
    trace_id: Label | None = Field(None, description="1-64 of A-Za-z0-9._-; otherwise one is made")
    session_id: Label | None = None
    metadata: dict[str, Any] | None = Field(None, description="Handed to the tool as it is")


class ExecuteParams(Params):
    tool_id: ToolId
    parameters: dict[str, Any] = Field(default_factory=dict, description="Arguments that fit the tool's schema")
    agent_id: Label | None = Field(
        None,
        description="A label for the log, never an identity",
        validation_alias=AliasChoices("agent_id", "identifier"),
    )
    execution_context: ExecutionContext | None = None
    timeout_override: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Seconds; can only shorten the tool's own timeout"
    )
    call_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = Field(
        None, description="Your name for this call, for tools.cancel; unique among your running calls"
    )
    idempotency_key: Annotated[str, Field(min_length=1, max_length=LABEL_CHARACTERS_MAX)] | None = None


class BatchParams(Params):
    requests: list[ExecuteParams] = Field(
        min_length=1, validation_alias=AliasChoices("requests", "executions"), description="Calls, run independently"
    )
    max_concurrent: Concurrency = 5


class TaskParams(ExecuteParams):
    task_id: Annotated[str, Field(min_length=1, max_length=LABEL_CHARACTERS_MAX)]
    dependencies: list[Label] = Field(default_factory=list, description="Tasks whose success this one needs")


class ParallelParams(Params):
    tasks: list[TaskParams] = Field(min_length=1, description="A graph of calls")
    max_concurrent: Concurrency = 10


class FallbackParams(Params):
    primary: ExecuteParams
    fallback: ExecuteParams | list[ExecuteParams] = Field(
        validation_alias=AliasChoices("fallback", "fallbacks"), description="Tried in order when the one before failed"
    )


class CancelParams(Params):
    execution_id: Label | None = None
    call_id: Label | None = None


class RestExecuteBody(Params):
    """The body of POST /api/v1/tools/{tool_id}/execute: ExecuteParams without the tool's id."""

    parameters: dict[str, Any] = Field(default_factory=dict, description="Arguments that fit the tool's schema")
    agent_id: Label | None = None
    execution_context: ExecutionContext | None = None
    timeout_override: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    call_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    idempotency_key: Annotated[str, Field(min_length=1, max_length=LABEL_CHARACTERS_MAX)] | None = None


class ToolSummary(BaseModel):
    tool_id: str
    name: str
    description: str
    version: str
    category: str
    tags: list[str]
    capabilities: list[str]


class ToolFlags(BaseModel):
    read_only: bool
    idempotent: bool
    destructive: bool
    cancel_on_disconnect: bool


class ToolLimits(BaseModel):
    max_concurrent: int | None


class ToolDetail(ToolSummary):
    parameters: dict[str, Any] = Field(description="JSON Schema 2020-12 of the parameters")
    result: dict[str, Any] | None = Field(description="JSON Schema 2020-12 of the result, when declared")
    timeout_seconds: float
    limits: ToolLimits
    flags: ToolFlags


class ToolPage(BaseModel):
    tools: list[ToolSummary]
    count: int = Field(description="Tools on this page")
    next_cursor: str | None = Field(description="For the next page; null on the last")


class SearchResult(BaseModel):
    tools: list[ToolSummary] = Field(description="Best first")
    count: int
    query: str


class ExecutionError(BaseModel):
    code: str
    category: str
    message: str
    retryable: bool
    retry_after_ms: int | None


class Execution(BaseModel):
    execution_id: str
    tool_id: str
    status: Status
    result: Any
    error: ExecutionError | None
    execution_time_ms: float
    overhead_ms: float = Field(description="Everything but the tool's own run")
    timestamp: str
    attempts: int
    cached: bool
    trace_id: str


class RpcError(BaseModel):
    """An error object of JSON-RPC 2.0; REST wraps the same."""

    code: int
    message: str
    data: dict[str, Any]


class Refused(BaseModel):
    """A call that did not run."""

    error: RpcError


class BatchResult(BaseModel):
    results: list[Execution | Refused] = Field(description="In the order of the requests")
    successful_count: int
    failed_count: int
    total_time_ms: float


class ParallelResult(BaseModel):
    results: dict[str, Execution | Refused]
    execution_order: list[str] = Field(description="Task ids in the order in which they began")
    successful_count: int
    failed_count: int
    total_time_ms: float


class FallbackResult(BaseModel):
    result: Execution
    used_fallback: bool
    attempts: list[Execution | Refused]
    total_time_ms: float


class CancelResult(BaseModel):
    cancelled: bool


class Pong(BaseModel):
    pong: Literal[True]


class Version(BaseModel):
    name: str
    version: str


class MethodNames(BaseModel):
    methods: list[str]
