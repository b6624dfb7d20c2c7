"""The HTTP request around a method, without its bytes: who asks, what its answer waits for, how large that may be.

Doors make one and read what methods leave in it; it knows neither ASGI nor a wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.calls import Caller, Client, ToolCall
from app.errors import ToolServiceError
from app.execution_log.commit import Commit


class AnswerBudget:
    """Bytes that the results in one HTTP answer may still take. Batches multiply: 27 KB of requests could ask for
    500 MB of results, each of them within its bound."""

    __slots__ = ("_left_bytes",)

    def __init__(self, bytes_max: int) -> None:
        self._left_bytes = bytes_max

    def take(self, size_bytes: int) -> bool:
        """Whether there is room for that much; takes it if so."""
        if size_bytes > self._left_bytes:
            return False
        self._left_bytes -= size_bytes
        return True


class RequestContext:
    """What a method may know of the HTTP request around it. `received_at` is `time.perf_counter()` seconds."""

    __slots__ = (
        "a2a",
        "allowance",
        "batch",
        "budget",
        "call",
        "caller",
        "client",
        "commits",
        "draining",
        "error",
        "idempotency_key",
        "method",
        "received_at",
        "retry_after_ms",
        "route",
        "scheme",
        "trace",
    )

    a2a: Mapping[str, Any] | None
    budget: AnswerBudget | None
    """Shared by the requests of a batch; None for one alone, whose result has a bound of its own."""
    allowance: Any
    """What the tightest limit of a single call has left: the door tells it in headers."""
    retry_after_ms: int | None
    """Of a single call that was refused."""
    commits: list[Commit] | None
    """Promises that rows of this request's calls are kept, which the answer waits for."""
    method: str | None
    """What was asked for, once it is known to be one of ours; None for a batch."""
    error: ToolServiceError | None
    """What the answer says went wrong, of a request alone."""
    batch: int | None
    """Requests in the batch; None for one alone."""
    route: str | None
    """Of a request of REST: the template of its path."""
    scheme: str
    """Set beside it."""
    idempotency_key: str | None
    """Of the header, for the one call that the request makes."""
    call: ToolCall | None
    """Which that is, for the access line."""

    def __init__(self, caller: Caller, received_at: float, client: Client | None = None, trace: Any = None) -> None:
        self.caller = caller
        self.received_at = received_at
        self.client = client
        self.trace = trace
        """The RequestTrace of the HTTP request; None where tracing is off."""
        self.draining = False
        """Set when all that was asked for was refused because the replica shuts down: the door answers 503."""
        self.a2a = self.budget = self.allowance = self.retry_after_ms = self.commits = self.method = None
        self.error = self.batch = self.route = self.idempotency_key = self.call = None
        self.scheme = "http"

    def in_batch(self, budget: AnswerBudget) -> RequestContext:
        """The context of one request of several."""
        own = RequestContext(self.caller, self.received_at, self.client, self.trace)
        own.budget = budget
        return own

    def hold_for(self, commit: Commit | None) -> None:
        """Do not answer before this is done."""
        if commit is None or commit.done:
            return
        if self.commits is None:
            self.commits = [commit]
        elif self.commits[-1] is not commit:  # the calls of a tick share one
            self.commits.append(commit)

    async def committed(self) -> None:
        """Returns when the answer may leave."""
        for commit in self.commits or ():
            await commit.wait()
