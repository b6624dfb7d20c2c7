"""What crosses the wire, as pydantic models: params of the methods, and the shapes that the API documents publish.

Params are validated with these; results are only described by them, for they are written as bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from app.calls import Status
from app.errors import REFUSALS
from app.execution_log.history import LIMIT_DEFAULT as HISTORY_LIMIT_DEFAULT
from app.execution_log.history import LIMIT_MAX as HISTORY_LIMIT_MAX
from app.tools.exports import Format
from app.tools.registry import LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX, SEARCH_LIMIT_DEFAULT, SEARCH_LIMIT_MAX
from app.tools.tool import CATEGORIES

LABEL_CHARACTERS_MAX = 256
IDEMPOTENCY_KEY_CHARACTERS_MAX = 256
PLAN_CONCURRENCY_MAX = 100

Label = Annotated[str, Field(max_length=LABEL_CHARACTERS_MAX)]
Names = Annotated[list[Label], Field(max_length=20)]
Concurrency = Annotated[int, Field(ge=1, le=PLAN_CONCURRENCY_MAX)]
TOOL_ID_CHARACTERS_MAX = 64
ToolId = Annotated[str, Field(description="Id of the tool, as tools.list gives it", max_length=TOOL_ID_CHARACTERS_MAX)]


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


Arguments = Annotated[dict[str, Any], Field(default_factory=dict, description="Arguments that fit the tool's schema")]
AgentLabel = Annotated[
    Label | None,
    Field(
        description="A label for the log, never an identity",
        validation_alias=AliasChoices("agent_id", "identifier"),
    ),
]
TimeoutOverride = Annotated[
    Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
    Field(description="Seconds; can only shorten the tool's own timeout"),
]
CallId = Annotated[
    Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None,
    Field(description="Your name for this call, for tools.cancel; unique among your running calls"),
]
IdempotencyKey = Annotated[
    Annotated[str, Field(min_length=1, max_length=IDEMPOTENCY_KEY_CHARACTERS_MAX)] | None,
    Field(description="A repeat with the same key is not run: it gets the first call's Execution, for 24 h"),
]


class RestExecuteBody(Params):
    """The body of POST /api/v1/tools/{tool_id}/execute: all of a call but the tool's id."""

    parameters: Arguments
    agent_id: AgentLabel = None
    execution_context: ExecutionContext | None = None
    timeout_override: TimeoutOverride = None
    call_id: CallId = None
    idempotency_key: IdempotencyKey = None


class ExecuteParams(RestExecuteBody, GetParams):
    """A whole call; `tool_id` comes first, for params by position."""


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


OneOrMany = Annotated[
    list[ExecuteParams],
    BeforeValidator(
        lambda value: value if isinstance(value, list) else [value],
        json_schema_input_type=ExecuteParams | list[ExecuteParams],
    ),
]
"""Not a union, which would report what is wrong with one call once for each of its branches."""


class FallbackParams(Params):
    primary: ExecuteParams
    fallback: OneOrMany = Field(
        validation_alias=AliasChoices("fallback", "fallbacks"), description="Tried in order when the one before failed"
    )


class CancelParams(Params):
    execution_id: Label | None = None
    call_id: Label | None = None


class ToolsQuery(Params):
    """The query of GET /api/v1/tools."""

    query: Label | None = Field(
        None, description="Words to look for in id, name, description and tags; the answer is then ranked, best first"
    )
    category: Label | None = Field(None, description=f"Only tools of this category: {', '.join(CATEGORIES)}")
    tag: Names | None = Field(None, description="Only tools that have any of these; may be repeated")
    limit: Annotated[int, Field(ge=1, le=LIST_LIMIT_MAX)] | None = Field(
        None,
        description=f"Tools in the answer; {LIST_LIMIT_DEFAULT}, or {SEARCH_LIMIT_DEFAULT} with query, if not given",
    )
    cursor: Label | None = Field(None, description="next_cursor of the page before; not together with query")


class ExportQuery(Params):
    """The query of GET /api/v1/tools/export."""

    format: Format = Field(description="Whose shape")
    category: Label | None = Field(None, description=f"Only tools of this category: {', '.join(CATEGORIES)}")
    tag: Names | None = Field(None, description="Only tools that have any of these; may be repeated")


class ExportReport(BaseModel):
    tool_id: str
    reason: str
    left_out: bool = Field(description="Whether the tool is missing among `tools`")


class ToolExport(BaseModel):
    format: Format
    tools: list[dict[str, Any]] = Field(description="As the provider's API takes its `tools`")
    reports: list[ExportReport] = Field(description="What could not be expressed, and what a model will miss")


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
    """What the tool declares. tools.get_rate_limit_status has what is left, and the policies of the service."""

    max_concurrent: int | None = Field(description="Runs at once on one replica, when declared")
    rate_limits: list[str] = Field(description="Rates of each tenant's calls, as 10/second")
    quotas: dict[Literal["daily", "monthly"], int] = Field(description="Each tenant's calls in a UTC day or month")
    cost: int = Field(description="What a call takes from each rate and quota")


class ToolDetail(ToolSummary):
    title: str | None = Field(description="For people, when declared")
    parameters: dict[str, Any] = Field(description="JSON Schema 2020-12 of the parameters")
    result: dict[str, Any] | None = Field(description="JSON Schema 2020-12 of the result, when declared")
    timeout_seconds: float
    limits: ToolLimits
    flags: ToolFlags


class ToolPage(BaseModel):
    tools: list[ToolSummary]
    count: int = Field(description="Tools on this page")
    next_cursor: str | None = Field(description="For the next page; null on the last")


class ToolListing(ToolPage):
    """The answer of GET /api/v1/tools; with query it is one page, ranked."""

    query: str | None = Field(None, description="The query, where there was one")


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
    """`replayed` is there where it is true."""

    execution_id: str
    tool_id: str
    status: Status
    result: Any
    error: ExecutionError | None
    execution_time_ms: float
    overhead_ms: float = Field(description="Everything but the tool's own run")
    timestamp: str
    attempts: int
    cached: bool = Field(description="Answered by a kept result, or by the run of an identical call")
    trace_id: str
    replayed: bool | None = Field(None, description="The first call with this idempotency_key, given again")


class Violation(BaseModel):
    path: str = Field(description="Where, as a.b.0")
    message: str
    type: str


class ErrorDetails(BaseModel):
    """What a client can act on. Some errors say more than this."""

    model_config = ConfigDict(extra="allow")

    error_type: str = Field(json_schema_extra={"enum": [kind.error_type for kind in REFUSALS]})
    retryable: bool
    execution_id: str | None = Field(None, description="Where a call of a tool was refused")
    retry_after_ms: int | None = Field(None, description="Where it is known")
    errors: list[Violation] | None = Field(None, description="With invalid_params: what is wrong where")


class RpcError(BaseModel):
    """An error object of JSON-RPC 2.0; REST wraps the same."""

    code: int
    message: str
    data: ErrorDetails


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


class LimitStatusParams(Params):
    tool_id: ToolId
    agent_id: Label | None = Field(
        None,
        validation_alias=AliasChoices("agent_id", "identifier"),
        description="Whose limits, where authentication is off; elsewhere they follow the credential",
    )


Moment = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]
"""RFC 3339."""


FilterText = Annotated[str, Field(max_length=LABEL_CHARACTERS_MAX, pattern=r"^[^\u0000]*$")]
"""PostgreSQL takes no NUL for text."""


class HistoryFilters(Params):
    tool_id: FilterText | None = Field(None, description="Only calls of this tool")
    status: Status | None = Field(None, description="Only calls that came to this")
    subject: FilterText | None = Field(None, description="Only calls of this subject")
    since: Moment | None = Field(None, description="Only calls that started at this time or later")
    until: Moment | None = Field(None, description="Only calls that started before this time")


LogCursor = Annotated[str, Field(pattern=r"^([A-Za-z0-9_-]{22}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})$")]
"""The id of a row, short as a page gives it, or long as the row has it."""


class HistoryPage(HistoryFilters):
    """Params of tools.get_execution_history, and the query of GET /api/v1/executions."""

    limit: Annotated[int, Field(ge=1, le=HISTORY_LIMIT_MAX)] | None = Field(
        None, description=f"Rows a page; {HISTORY_LIMIT_DEFAULT} when not given"
    )
    cursor: LogCursor | None = Field(None, description="next_cursor of the page before")


class ExportedExecutions(HistoryFilters):
    """The query of GET /api/v1/executions/export."""

    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Rows at most; all when not given")
    cursor: LogCursor | None = Field(
        None, description="Go on after this execution_id, the last of a stream that was cut off; or a next_cursor"
    )


class LoggedPayload(BaseModel):
    content: Any = Field(description="Redacted and capped; null unless payloads are logged in full")
    size_bytes: int | None
    sha256: str | None


class LoggedExecution(BaseModel):
    """A row of the log."""

    execution_id: str
    tool_id: str
    tool_version: str | None
    tenant: str
    subject: str
    agent_id: str | None
    status: Status
    error_type: str | None
    error_code: str | None
    started_at: str
    finished_at: str
    execution_ms: float
    overhead_ms: float
    attempts: int
    cached: bool
    client_gone: bool
    trace_id: str | None
    cost: int
    parameters: LoggedPayload
    result: LoggedPayload


class ExecutionPage(BaseModel):
    executions: list[LoggedExecution] = Field(description="Newest first")
    next_cursor: str | None


LOGGED_EXAMPLE = {
    "execution_id": "01981c5e-7c1a-7000-8000-0123456789ab",
    "tool_id": "echo",
    "tool_version": "1.0.0",
    "tenant": "acme",
    "subject": "planner",
    "agent_id": None,
    "status": "success",
    "error_type": None,
    "error_code": None,
    "started_at": "2026-11-20T15:00:00.000Z",
    "finished_at": "2026-11-20T15:00:00.000Z",
    "execution_ms": 0.05,
    "overhead_ms": 0.12,
    "attempts": 1,
    "cached": False,
    "client_gone": False,
    "trace_id": "01981c5e7c1a700080000123456789ab",
    "cost": 1,
    "parameters": {"content": None, "size_bytes": 19, "sha256": "9" * 64},
    "result": {"content": None, "size_bytes": 19, "sha256": "9" * 64},
}


class RateLeft(BaseModel):
    limit: int
    remaining: int
    reset_at: str = Field(description="When all of it is there again")
    window_seconds: float


class QuotaLeft(BaseModel):
    limit: int
    used: int
    remaining: int
    reset_at: str = Field(description="End of the UTC day or month")


class QuotasLeft(BaseModel):
    daily: QuotaLeft | None
    monthly: QuotaLeft | None


class PolicyLeft(BaseModel):
    rule: str = Field(description="As a refusal names it in data.rule")
    kind: Literal["rate", "daily", "monthly"]
    limit: int
    remaining: int
    reset_at: str
    window_seconds: float | None = Field(None, description="Of a rate")
    burst: int | None = Field(None, description="Of a rate: calls that may come at once")
    factor: float | None = Field(None, description="Of a rate that adapts: the part of it that holds at this time")
    used: int | None = Field(None, description="Of a quota")


class LimitStatus(BaseModel):
    tool_id: str
    cost: int = Field(description="What one call of this tool takes from each limit")
    rate_limit: RateLeft | None = Field(description="The tightest")
    quota: QuotasLeft | None
    policies: list[PolicyLeft] = Field(description="Each limit that is enforced")


class CancelResult(BaseModel):
    cancelled: bool


class Pong(BaseModel):
    pong: Literal[True]


class Version(BaseModel):
    name: str
    version: str


class MethodNames(BaseModel):
    methods: list[str]
