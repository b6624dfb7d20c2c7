"""An executor with the tools of one test, and the check that every call gave back what it took."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.bus import Bus
from app.cache.file_store import FileStore
from app.cache.idempotency import Idempotency
from app.cache.results import ResultCache
from app.cache.store import CacheStore
from app.calls import LOCAL_CALLER, Caller, Execution, ToolCall, new_execution_id
from app.egress import EgressClient, parse_egress_allow
from app.executor.executor import Executor
from app.executor.reuse import Reuse
from app.executor.runner import Runner
from app.executor.threads import ThreadPool
from app.limits.adaptive import LoadControl, Mode
from app.limits.admission import Admission
from app.limits.concurrency import Slots
from app.limits.memory_store import MemoryStore
from app.limits.policy import Policies, Policy
from app.limits.store import LimitStore
from app.telemetry.metrics import Metrics
from app.tools.registry import Registry
from app.tools.tool import FunctionTool
from tests.waiting import SOON_S


@dataclass
class Rig:
    executor: Executor
    metrics: Metrics
    slots: Slots
    threads: ThreadPool

    def start(
        self, tool: FunctionTool | str, parameters: Any = None, *, caller: Caller = LOCAL_CALLER, **call: Any
    ) -> asyncio.Task[Execution]:
        """A call on its way; its execution id is the task's name."""
        tool_id = tool if isinstance(tool, str) else tool.spec.id
        execution_id = new_execution_id()
        one = ToolCall(execution_id, tool_id, parameters or {}, caller, time.perf_counter(), **call)
        return asyncio.create_task(self.executor.execute(one), name=execution_id)

    async def call(self, tool: FunctionTool | str, parameters: Any = None, **call: Any) -> Execution:
        return await asyncio.wait_for(self.start(tool, parameters, **call), SOON_S)

    def runs(self, tool: FunctionTool) -> dict[str, int]:
        """How often the tool ran, by how it ended."""
        return {status: count for status, count in self.metrics.for_tool(tool.spec.id).executions.items() if count}

    def errors(self) -> dict[str, int]:
        return {error_type: count for error_type, count in self.metrics.errors.items() if count}

    def is_quiet(self) -> bool:
        """Nothing runs, waits or holds a slot."""
        slots = [self.slots, *(state.slots for state in self.executor._states.values() if state.slots)]
        slots.append(self.executor.control.slow_slots)
        held = [count for one in slots for count in (one.running, one.queued)]
        return not any((*held, self.executor.concurrency, self.executor.queue_depth, self.executor.calls._by_call_id))


@contextlib.asynccontextmanager
async def opened(
    *tools: FunctionTool,
    slots: Slots | None = None,
    threads: ThreadPool | None = None,
    ceiling_s: float = 30.0,
    result_bytes_max: int = 1_048_576,
    policies: Iterable[Policy] = (),
    store: LimitStore | None = None,
    keys: CacheStore | None = None,
    results: ResultCache | None = None,
    bus: Bus | None = None,
    mode: Mode = "off",
    breakers: bool = True,
    egress: str = "",
) -> AsyncIterator[Rig]:
    """A rig; when it closes, no call may have left anything behind. `mode` is that of limits that adapt."""
    metrics = Metrics()
    slots = slots or Slots(100)
    threads = threads or ThreadPool()
    http = EgressClient(parse_egress_allow(egress), 1, ssl_context=certificates())
    if results is None:
        results = ResultCache(None, 2**20, 2**20, compress=False)
    with tempfile.TemporaryDirectory() as folder:
        own_keys = FileStore(Path(folder, "keys.db"))
        reuse = Reuse(Idempotency(keys or own_keys), results)
        executor = Executor(
            Registry(tools, timeout_ceiling_s=ceiling_s),
            Runner(threads, result_bytes_max, metrics.count_abandoned),
            LoadControl(slots, mode),
            Admission(Policies(policies), store or MemoryStore()),
            None,
            reuse,
            bus or Bus(),
            http,
            metrics,
            timeout_ceiling_s=ceiling_s,
            breakers=breakers,
        )
        rig = Rig(executor, metrics, slots, threads)
        yield rig
        await reuse.close()
        assert rig.is_quiet() and not len(reuse._flights)
        threads.close()
        await http.aclose()
        await own_keys.close()


SEEN: ContextVar[str] = ContextVar("SEEN", default="nothing")


def leave_a_mark(text: str) -> str:
    """A validator that returns what the one before it in this context was given."""
    before = SEEN.get()
    SEEN.set(text)
    return before


@functools.cache
def certificates() -> ssl.SSLContext:
    """Read once: no tool here goes out, and reading them takes longer than most tests."""
    return ssl.create_default_context()
