"""Everything that can go wrong, once: the word, the JSON-RPC code, the HTTP status, and whether to try again.

Two families. A refusal (`ToolServiceError`) means that the call did not run; it travels as a JSON-RPC or REST error.
A failure (`ToolError` and the runner's own) means that the tool ran; it travels inside an Execution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class ErrorKind(NamedTuple):
    """One line of the error table: names and numbers that clients branch on."""

    error_type: str
    rpc_code: int
    http_status: int
    retryable: bool


PARSE_ERROR = ErrorKind("parse_error", -32700, 400, False)
INVALID_REQUEST = ErrorKind("invalid_request", -32600, 400, False)
METHOD_NOT_FOUND = ErrorKind("method_not_found", -32601, 404, False)
INVALID_PARAMS = ErrorKind("invalid_params", -32602, 422, False)
INTERNAL = ErrorKind("internal", -32603, 500, False)
RATE_LIMIT = ErrorKind("rate_limit", -32001, 429, True)
UNAUTHENTICATED = ErrorKind("unauthenticated", -32002, 401, False)
PERMISSION_DENIED = ErrorKind("permission_denied", -32003, 403, False)
TOOL_NOT_FOUND = ErrorKind("tool_not_found", -32004, 404, False)
QUOTA = ErrorKind("quota", -32005, 429, True)
OVERLOADED = ErrorKind("overloaded", -32006, 503, True)
IDEMPOTENCY_CONFLICT = ErrorKind("idempotency_conflict", -32007, 409, True)
DEPENDENCY_UNAVAILABLE = ErrorKind("dependency_unavailable", -32008, 503, True)
DRAINING = ErrorKind("draining", -32009, 503, True)

REFUSALS = (
    PARSE_ERROR,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    INVALID_PARAMS,
    INTERNAL,
    RATE_LIMIT,
    UNAUTHENTICATED,
    PERMISSION_DENIED,
    TOOL_NOT_FOUND,
    QUOTA,
    OVERLOADED,
    IDEMPOTENCY_CONFLICT,
    DEPENDENCY_UNAVAILABLE,
    DRAINING,
)


class FailureKind(NamedTuple):
    """How a run can end badly. `category` is what metrics and alerts count; `code` is what agents branch on."""

    code: str
    category: str
    retryable: bool


TOOL_TIMEOUT = FailureKind("TOOL_TIMEOUT", "timeout", True)
TOOL_CANCELLED = FailureKind("TOOL_CANCELLED", "cancelled", False)
TOOL_ERROR = FailureKind("TOOL_ERROR", "tool_error", False)
TOOL_CRASHED = FailureKind("TOOL_CRASHED", "tool_crash", False)
RESULT_INVALID = FailureKind("TOOL_RESULT_INVALID", "result_invalid", False)
RESULT_TOO_LARGE = FailureKind("TOOL_RESULT_TOO_LARGE", "result_too_large", False)
DEPENDENCY_SKIPPED = FailureKind("DEPENDENCY_FAILED", "skipped", False)

FAILURES = (
    TOOL_TIMEOUT,
    TOOL_CANCELLED,
    TOOL_ERROR,
    TOOL_CRASHED,
    RESULT_INVALID,
    RESULT_TOO_LARGE,
    DEPENDENCY_SKIPPED,
)

ERROR_TYPES = tuple(kind.error_type for kind in REFUSALS) + tuple(kind.category for kind in FAILURES)
"""Every value that the label `error_type` can take."""


class ToolServiceError(Exception):
    """A refusal. `data` holds what a client can act on and never holds a rejected value."""

    kind: ErrorKind = INTERNAL

    def __init__(self, message: str, *, retry_after_ms: int | None = None, **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.data = data
        self.http_status = self.kind.http_status
        self.execution_id: str | None = None
        """Set by the executor when it was a call of a tool that was refused."""
        self.allowance: Any = None
        """What the limit that refused it has left, for the door's headers."""

    def forget_origin(self) -> None:
        """Once it is an answer: tracebacks lead to frames that hold the error, a circle for the garbage collector."""
        self.__traceback__ = self.__context__ = self.__cause__ = None

    def as_data(self) -> dict[str, Any]:
        """The error's `data` member: what is the same for every error, then what this one adds."""
        data: dict[str, Any] = {"error_type": self.kind.error_type, "retryable": self.kind.retryable}
        if self.execution_id is not None:
            data["execution_id"] = self.execution_id
        if self.retry_after_ms is not None:
            data["retry_after_ms"] = self.retry_after_ms
        data.update(self.data)
        return data

    def as_error(self) -> dict[str, Any]:
        """The error object of JSON-RPC 2.0, section 5.1; REST wraps the same object."""
        return {"code": self.kind.rpc_code, "message": self.message, "data": self.as_data()}


class ParseError(ToolServiceError):
    kind = PARSE_ERROR


class InvalidRequest(ToolServiceError):
    kind = INVALID_REQUEST


class BodyTooLarge(InvalidRequest):
    """The body passes MAX_REQUEST_BYTES: HTTP 413 on every door."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"Request body is over {limit_bytes} bytes; send less or raise MAX_REQUEST_BYTES")
        self.http_status = 413


class BodyTooSlow(InvalidRequest):
    """The body did not arrive within REQUEST_READ_TIMEOUT_S: HTTP 408 on every door."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"Request body did not arrive within {timeout_s:g} s")
        self.http_status = 408


class MethodNotFound(ToolServiceError):
    kind = METHOD_NOT_FOUND


class InvalidParams(ToolServiceError):
    """`errors` is `[{path, message, type}]`, one entry per violation."""

    kind = INVALID_PARAMS

    def __init__(self, message: str, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(message, errors=errors or [])

    @classmethod
    def at(cls, path: str, message: str, error_type: str = "value_error") -> InvalidParams:
        """One violation, where no validator ran."""
        return cls("Invalid params", [{"path": path, "message": message, "type": error_type}])


class InternalError(ToolServiceError):
    """Our bug. The message says nothing; the log has the traceback under the same execution id."""

    kind = INTERNAL

    def __init__(self) -> None:
        super().__init__("Internal error")


class PermissionDenied(ToolServiceError):
    kind = PERMISSION_DENIED


class ToolNotFound(ToolServiceError):
    """Unknown or not visible to the caller: the two look the same."""

    kind = TOOL_NOT_FOUND

    def __init__(self) -> None:
        super().__init__("Tool not found; tools.list shows what you may call")


class Unauthenticated(ToolServiceError):
    """No credential, or one that is not good: HTTP 401 on every door. Never says which part was wrong."""

    kind = UNAUTHENTICATED


class RateLimited(ToolServiceError):
    """`limit` is how many the rate allows, `rule` the policy's name."""

    kind = RATE_LIMIT

    def __init__(self, rule: str, limit: int, retry_after_ms: int | None) -> None:
        super().__init__("Rate limit reached", retry_after_ms=retry_after_ms, limit=limit, rule=rule)


class QuotaExceeded(ToolServiceError):
    """`reset_at` is when the quota's day or month ends, RFC 3339."""

    kind = QUOTA

    def __init__(self, rule: str, limit: int, reset_at: str, retry_after_ms: int | None) -> None:
        super().__init__("Quota used up", retry_after_ms=retry_after_ms, limit=limit, rule=rule, reset_at=reset_at)


class DependencyUnavailable(ToolServiceError):
    """A store that must answer is away, or the journal has no room: nothing ran."""

    kind = DEPENDENCY_UNAVAILABLE


class Overloaded(ToolServiceError):
    kind = OVERLOADED


class IdempotencyConflict(ToolServiceError):
    """The key of a call stands for another one, or for one that has no outcome. Nothing ran. `data.reason` says which;
    `data.first_execution_id` is the call that the key stands for."""

    kind = IDEMPOTENCY_CONFLICT

    def __init__(self, message: str, reason: str, first: str | None, retry_after_ms: int | None = None) -> None:
        known = {} if first is None else {"first_execution_id": first}
        super().__init__(message, retry_after_ms=retry_after_ms, reason=reason, **known)

    @classmethod
    def other_call(cls, first: str | None) -> IdempotencyConflict:
        """HTTP 422: the caller's mistake."""
        conflict = cls("This idempotency_key was used with other parameters; take a new one", "other_call", first)
        conflict.http_status = 422
        conflict.data["retryable"] = False
        return conflict

    @classmethod
    def still_running(cls, first: str | None, retry_after_ms: int) -> IdempotencyConflict:
        return cls("The first call with this idempotency_key still runs", "still_running", first, retry_after_ms)

    @classmethod
    def outcome_unknown(cls, first: str | None) -> IdempotencyConflict:
        """Its process ended before it said what came of it."""
        conflict = cls(
            "The first call with this idempotency_key was cut off: whether it had its effect is unknown. Look where it "
            "would show, then use a new key",
            "outcome_unknown",
            first,
        )
        conflict.data["retryable"] = False
        return conflict


class Draining(ToolServiceError):
    kind = DRAINING

    def __init__(self) -> None:
        super().__init__("Shutting down; call another replica", retry_after_ms=1000)


_CODE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MESSAGE_CHARACTERS_MAX = 2_000
"""An agent reads the message as part of its prompt: long enough to explain, too short to flood."""


def clean_text(text: str) -> str:
    """Text for an agent: bounded, without control or bidirectional characters, without lone surrogates."""
    return _UNPRINTABLE.sub("", text[:MESSAGE_CHARACTERS_MAX])


class ToolError(Exception):
    """What a tool raises to tell the agent what went wrong. Its text gets there without what looks like a secret.

    `code` is upper snake case and stable. `retryable` says whether the same call may succeed later.
    """

    in_doubt = False
    """What was asked of another may have been done though nobody said so: unless the tool is idempotent or read-only,
    the error is not retryable then. Set by the HTTP client; a tool that knows that a repeat does no harm clears it."""

    def __init__(
        self,
        message: str,
        *,
        code: str = TOOL_ERROR.code,
        retryable: bool = False,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code if _CODE.fullmatch(code) else TOOL_ERROR.code
        self.retryable = retryable
        self.retry_after_ms = retry_after_ms


class UpstreamFailed(ToolError):
    """A server that a tool asked gave no good answer. `host` is the one that the tool named, whatever it redirected to;
    `asked` False: its breaker was open and nothing was sent."""

    def __init__(self, message: str, host: str, *, code: str, asked: bool = True, **options: Any) -> None:
        super().__init__(message, code=code, **options)
        self.host = host
        self.asked = asked


class Failure(NamedTuple):
    """The `error` member of an Execution that did not succeed."""

    code: str
    category: str
    message: str
    retryable: bool
    retry_after_ms: int | None = None

    def as_dict(self) -> Mapping[str, Any]:
        return self._asdict()


def failure(kind: FailureKind, message: str) -> Failure:
    return Failure(kind.code, kind.category, message, kind.retryable)


class RunFailed(Exception):
    """The tool was started and did not succeed; carries what the Execution will say."""

    def __init__(self, cause: Failure) -> None:
        super().__init__(cause.message)
        self.cause = cause
