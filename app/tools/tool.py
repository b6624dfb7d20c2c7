"""What a tool is: a Python function and its declaration.

Tool authors import `tool`, `ToolContext` and `ToolError` from here and nothing else. Knows no HTTP and no run.
"""

from __future__ import annotations

import dis
import inspect
import math
import re
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, NamedTuple, Protocol, overload

import orjson
from pydantic import Field
from pydantic.fields import FieldInfo

from app.calls import Caller, Progress
from app.egress import EgressClient
from app.errors import ToolError
from app.tools.result_schema import ResultSchema
from app.tools.schema import ParameterSchema

__all__ = ["CATEGORIES", "FunctionTool", "Tool", "ToolContext", "ToolDeclarationError", "ToolError", "ToolSpec", "tool"]

Category = Literal[
    "utility",
    "search",
    "code_execution",
    "api_client",
    "data_processing",
    "communication",
    "file_system",
    "database",
    "monitoring",
    "security",
    "custom",
]
CATEGORIES: tuple[str, ...] = typing.get_args(Category)

LogMode = Literal["durable", "strict", "buffered"]
LogPayloads = Literal["off", "metadata", "full"]
LOG_MODES: tuple[str | None, ...] = (*typing.get_args(LogMode), None)
LOG_PAYLOADS: tuple[str | None, ...] = (*typing.get_args(LogPayloads), None)
"""None is the service's own."""

COST_MAX = 10_000
"""The time that a call of this cost takes at the slowest rate still counts in whole microseconds below 2**53."""

NUMBER_MAX = 1_000_000_000
"""Of retries, slots, and seconds that a result is kept: far more than anybody means. JSON writes no integer past 64
bits, and Redis counts an expiry in milliseconds of as many."""

_ID = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
"""The intersection of what model providers accept as a function's name."""


class ToolDeclarationError(TypeError):
    """The declaration is wrong; says which tool and what to change."""


async def _unheard(done: float, total: float | None, message: str | None) -> None:
    """Progress where nobody listens."""


class ToolContext(NamedTuple):
    """What a tool may know of the call that runs it. Injected where a parameter is annotated with this type."""

    execution_id: str
    caller: Caller
    deadline: float
    """`time.perf_counter()` seconds; the run is cancelled then."""
    http: EgressClient
    """The only way out: guarded, bounded, shared."""
    agent_id: str | None = None
    trace_id: str | None = None
    session_id: str | None = None
    metadata: Mapping[str, Any] | None = None
    on_progress: Progress = _unheard
    idempotency_key: str | None = None
    """The caller's, for whoever does the work: a run with it is repeated with it."""

    def remaining_s(self) -> float:
        """Seconds until the deadline, never below 0."""
        return max(0.0, self.deadline - time.perf_counter())

    async def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Tell whoever listens how far the run is; costs nothing when nobody does."""
        await self.on_progress(done, total, message)


_NAME_LISTS = ("tags", "capabilities", "rate_limits", "required_scopes", "client_capabilities")

_TYPES: tuple[tuple[tuple[str, ...], tuple[type, ...], str], ...] = (
    (("id", "name", "description", "version"), (str,), "a text"),
    (("title",), (str, NoneType), "a text"),
    (("read_only", "idempotent", "destructive", "cache_shared", "cancel_on_disconnect"), (bool,), "True or False"),
    (("retries", "cost"), (int,), "a whole number"),
    (("max_concurrent",), (int, NoneType), "a whole number"),
    (("timeout", "cache_ttl"), (int, float, NoneType), "a number"),
)
"""Fields of a ToolSpec and what they may be; True and False are no numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool's declaration, as agents and operators see it."""

    id: str
    name: str
    description: str
    version: str = "1.0.0"
    category: str = "custom"
    tags: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    timeout: float | None = None
    """Seconds; None is the service's ceiling."""
    read_only: bool = False
    idempotent: bool = False
    destructive: bool = False
    title: str | None = None
    retries: int = 0
    rate_limits: tuple[str, ...] = ()
    quotas: Mapping[str, int] = field(default_factory=dict)
    max_concurrent: int | None = None
    cache_ttl: float | None = None
    cache_shared: bool = False
    cancel_on_disconnect: bool = False
    log_mode: LogMode | None = None
    log_payloads: LogPayloads | None = None
    required_scopes: frozenset[str] = frozenset()
    cost: int = 1
    client_capabilities: tuple[str, ...] = ()
    """What an MCP client must have declared. Other doors have no such thing and do not ask."""

    def __post_init__(self) -> None:
        try:
            problem = self._mistyped() or next((text for holds, text in self._problems() if holds), None)
        except TypeError as error:
            problem = f"a field has the wrong type: {error}"
        if problem:
            raise ToolDeclarationError(f"tool {self.id!r}: {problem}")

    def _mistyped(self) -> str | None:
        """The first field that is not what it must be. Taken as it is, it would be met where nobody expects it: when
        the service starts, or when the database is given a row."""
        for names, types, text in _TYPES:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                    return f"{name} has the wrong type: it must be {text}"
        for name in _NAME_LISTS:
            if not all(isinstance(text, str) for text in getattr(self, name)):
                return f"{name} must be a list of texts"
        return None

    def _problems(self) -> list[tuple[bool, str]]:
        return [
            (not _ID.fullmatch(self.id), f"id must match ^{_ID.pattern}$"),
            (not self.description.strip(), "needs a docstring or a description; agents choose by it"),
            (self.category not in CATEGORIES, f"category must be one of {', '.join(CATEGORIES)}"),
            (
                self.timeout is not None and not 0 < self.timeout < math.inf,
                "timeout must be over 0 seconds",
            ),
            (
                self.max_concurrent is not None and not 1 <= self.max_concurrent <= NUMBER_MAX,
                f"max_concurrent must be 1 to {NUMBER_MAX}",
            ),
            (not 0 <= self.retries <= NUMBER_MAX, f"retries must be 0 to {NUMBER_MAX}"),
            (not 0 <= self.cost <= COST_MAX, f"cost must be 0 to {COST_MAX}"),
            (
                self.cache_ttl is not None and not 0 < self.cache_ttl <= NUMBER_MAX,
                f"cache_ttl must be over 0 and at most {NUMBER_MAX} seconds",
            ),
            (self.cache_ttl is not None and not self.read_only, "cache_ttl needs read_only=True"),
            (self.log_mode not in LOG_MODES, f"log_mode must be one of {_listed(LOG_MODES)}"),
            (self.log_payloads not in LOG_PAYLOADS, f"log_payloads must be one of {_listed(LOG_PAYLOADS)}"),
            (not self.quotas.keys() <= {"daily", "monthly"}, "quotas are daily and monthly"),
            (any(amount < 1 for amount in self.quotas.values()), "quotas must be at least 1"),
            (self.read_only and self.destructive, "a tool cannot be both read_only and destructive"),
        ]


def _listed(allowed: tuple[str | None, ...]) -> str:
    return ", ".join(filter(None, allowed))


class Tool(Protocol):
    """What the registry keeps and the runner runs. `FunctionTool` is one way to be it."""

    @property
    def spec(self) -> ToolSpec: ...
    @property
    def parameters(self) -> ParameterSchema: ...
    @property
    def result(self) -> ResultSchema: ...
    @property
    def blocking(self) -> bool:
        """True: `invoke` returns the value and may block, so it runs in a thread. False: it returns a coroutine."""

    @property
    def never_waits(self) -> bool:
        """The coroutine has no `await`, so its first step is its last one."""

    @property
    def takes_context(self) -> bool:
        """It may see who calls."""

    def invoke(self, arguments: dict[str, Any], context: ToolContext | None) -> Any:
        """`context` is None only where `takes_context` is False."""

    def rebuilt(self) -> Tool:
        """The same tool with its schemas built anew, for ENABLE_PARAMETER_VALIDATION_CACHE=false."""


class FunctionTool:
    """A decorated function. Calling it calls the function, so that a tool's own tests need no service."""

    __slots__ = ("_context_parameter", "_hints", "blocking", "function", "never_waits", "parameters", "result", "spec")

    def __init__(self, function: Callable[..., Any], spec: ToolSpec) -> None:
        self.function = function
        self.spec = spec
        self.blocking = not inspect.iscoroutinefunction(function)
        self.never_waits = not self.blocking and not _awaits(function)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ToolDeclarationError(f"tool {spec.id!r}: must return its result, not yield")
        try:
            self._hints = typing.get_type_hints(function, include_extras=True)
            self._context_parameter = self._find_context()
            self._build_schemas()
        except ToolDeclarationError:
            raise
        except NameError as error:
            raise ToolDeclarationError(f"tool {spec.id!r}: type hint {error.name!r} is not a global name") from error
        except Exception as error:  # pydantic and the hints' own types have many ways to refuse
            raise ToolDeclarationError(f"tool {spec.id!r}: {error}") from error

    @property
    def takes_context(self) -> bool:
        return self._context_parameter is not None

    def _find_context(self) -> str | None:
        names = inspect.signature(self.function).parameters
        return next((name for name in names if _is_context(self._hints.get(name))), None)

    def _build_schemas(self) -> None:
        self.parameters = ParameterSchema(dict(self._fields()))
        self.result = ResultSchema(self._hints.get("return", Any))
        spec = self.spec
        shown = spec.name, spec.title, spec.description, spec.version, spec.tags, spec.capabilities
        # One tool that cannot be written would leave callers without the whole list.
        orjson.dumps((shown, self.parameters.json_schema, self.result.json_schema))

    def _fields(self) -> typing.Iterator[tuple[str, tuple[Any, FieldInfo | Any]]]:
        for name, parameter in inspect.signature(self.function).parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ToolDeclarationError(f"tool {self.spec.id!r}: parameter {name!r} must be nameable, not * or /")
            if name == self._context_parameter:
                continue
            if name not in self._hints:
                raise ToolDeclarationError(f"tool {self.spec.id!r}: parameter {name!r} needs a type hint")
            # An empty Field() and not `...`, which would overrule a default inside Annotated.
            yield name, (self._hints[name], Field() if parameter.default is parameter.empty else parameter.default)

    def rebuilt(self) -> FunctionTool:
        return FunctionTool(self.function, self.spec)

    def invoke(self, arguments: dict[str, Any], context: ToolContext | None) -> Any:
        if self._context_parameter is not None:
            return self.function(**arguments, **{self._context_parameter: context})
        return self.function(**arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _awaits(function: Callable[..., Any]) -> bool:
    """Whether a coroutine function can be suspended: every way to wait compiles to these. True when unknown."""
    code = getattr(function, "__code__", None)
    if code is None or not code.co_flags & inspect.CO_COROUTINE:
        return True  # a plain function that is only marked as one that returns a coroutine
    return any(step.opname in ("SEND", "YIELD_VALUE") for step in dis.get_instructions(code))


def _is_context(hint: Any) -> bool:
    """`ToolContext`, also as `ToolContext | None` and inside Annotated."""
    if typing.get_origin(hint) is typing.Annotated:
        return _is_context(hint.__origin__)
    parts = typing.get_args(hint)
    return hint is ToolContext or (len(parts) == 2 and ToolContext in parts and type(None) in parts)


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(
    *,
    id: str | None = None,
    name: str | None = None,
    description: str | None = None,
    version: str = "1.0.0",
    category: Category = "custom",
    tags: Sequence[str] = (),
    capabilities: Sequence[str] = (),
    timeout: float | None = None,
    read_only: bool = False,
    idempotent: bool = False,
    destructive: bool = False,
    title: str | None = None,
    retries: int = 0,
    rate_limits: Sequence[str] = (),
    quotas: Mapping[str, int] | None = None,
    max_concurrent: int | None = None,
    cache_ttl: float | None = None,
    cache_shared: bool = False,
    cancel_on_disconnect: bool = False,
    log_mode: LogMode | None = None,
    log_payloads: LogPayloads | None = None,
    required_scopes: Sequence[str] = (),
    cost: int = 1,
    client_capabilities: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(function: Callable[..., Any] | None = None, /, **declared: Any) -> Any:
    """Declare a function as a tool: type hints and pydantic `Field` constraints are its schema.

    `id` defaults to the function's name, `description` to its docstring. Async functions run on the event loop,
    sync functions in a bounded pool of threads. Raises ToolDeclarationError when the declaration cannot hold.
    """

    def declare(target: Callable[..., Any]) -> FunctionTool:
        return FunctionTool(target, _spec(target, dict(declared)))

    return declare if function is None else declare(function)


def _spec(function: Callable[..., Any], declared: dict[str, Any]) -> ToolSpec:
    tool_id = declared.pop("id", None) or getattr(function, "__name__", "")
    for names in _NAME_LISTS:
        # A bare text is a sequence too: of its letters.
        if isinstance(declared.get(names), str):
            raise ToolDeclarationError(f"tool {tool_id!r}: {names} must be a list of texts")
        declared[names] = tuple(declared.get(names, ()))
    if unknown := declared.keys() - {known.name for known in fields(ToolSpec)}:
        raise ToolDeclarationError(f"tool {tool_id!r}: there is no option {min(unknown)!r}")
    return ToolSpec(
        id=tool_id,
        name=declared.pop("name", None) or str(tool_id).replace("_", " ").title(),
        description=declared.pop("description", None) or inspect.getdoc(function) or "",
        required_scopes=frozenset(declared.pop("required_scopes")),
        quotas=dict(declared.pop("quotas", None) or {}),
        **declared,
    )
