"""The calls that run here at this moment: who may come in, and how one of them is cancelled, from any replica.

Knows no tool and no limit; the executor enters each call and takes it out again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from app.bus import Bus, Message
from app.calls import Caller, ToolCall
from app.errors import Draining, InvalidParams
from app.executor.run import Passage


class RunningCalls:
    """One per service."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        bus.listeners["cancel"] = self._cancel_for
        self._by_id: dict[str, Passage] = {}
        self._by_call_id: dict[tuple[str, str, str], Passage] = {}
        self.accepting = True
        """Whether new calls may come in."""
        self._ended = False

    def __len__(self) -> int:
        return len(self._by_id)

    def stop_accepting(self) -> None:
        """From now on every new call is refused as draining; what runs goes on."""
        self.accepting = False

    async def cut_off(self, patience_s: float) -> None:
        """Cancel all that run, and give them so long to end. Nothing comes in any more, whoever let it in before: the
        end of one call of a batch would begin the next."""
        self.accepting = False
        self._ended = True
        running = list(self._by_id.values())
        for run in running:
            run.cancel()
        if running:
            await asyncio.sleep(patience_s)

    def admitted(self, calls: Iterable[ToolCall]) -> list[ToolCall]:
        """Let a request's calls in together: a drain that begins later does not cut it in two. Raises Draining."""
        if not self.accepting:
            raise Draining
        return [replace(call, admitted=True) for call in calls]

    def check(self, call: ToolCall) -> None:
        """Whether it may come in. Raises Draining, and InvalidParams for a call_id that another one of the caller's
        has."""
        if not (self.accepting or (call.admitted and not self._ended)):
            raise Draining
        if call.call_id is not None and (call.caller.tenant, call.caller.subject, call.call_id) in self._by_call_id:
            raise InvalidParams.at("call_id", "A running call of yours has this call_id")

    def enter(self, run: Passage) -> None:
        """Raises as `check` does."""
        call = run.call
        if call.call_id is not None or not self.accepting:
            self.check(call)
        if call.call_id is not None:
            self._by_call_id[call.caller.tenant, call.caller.subject, call.call_id] = run
        self._by_id[call.execution_id] = run

    def leave(self, run: Passage) -> None:
        call = run.call
        del self._by_id[call.execution_id]
        if call.call_id is not None:
            del self._by_call_id[call.caller.tenant, call.caller.subject, call.call_id]

    def cancel(self, caller: Caller, execution_id: str | None, call_id: str | None) -> bool:
        """Cancel a call of the caller's own that runs here, or anyone's for an admin. False: there is none, or it has
        its outcome already."""
        return self._cancel(caller.tenant, caller.subject, execution_id, call_id, is_admin="admin" in caller.scopes)

    async def cancel_anywhere(self, caller: Caller, execution_id: str | None, call_id: str | None) -> bool:
        """`cancel` on whichever replica runs it; by a `call_id` that is none of an admin's own, anyone's. False too
        where the others cannot be reached."""
        is_admin = "admin" in caller.scopes
        asked: dict[str, Any] = {
            "tenant": caller.tenant,
            "subject": caller.subject,
            "is_admin": is_admin,
            "execution_id": execution_id,
            "call_id": call_id,
        }
        if self.cancel(caller, execution_id, call_id) or await self._bus.ask("cancel", **asked):
            return True
        if call_id is None or not is_admin:
            return False
        return self._cancel_anyones(call_id) or await self._bus.ask("cancel", **asked, anyones=True)

    def _cancel_for(self, asked: Message) -> bool:
        """Another replica's caller."""
        texts = [asked.get(name) for name in ("tenant", "subject", "execution_id", "call_id")]
        if not all(text is None or isinstance(text, str) for text in texts) or None in texts[:2]:
            return False
        is_admin = asked.get("is_admin") is True
        if asked.get("anyones") is True:
            return is_admin and texts[3] is not None and self._cancel_anyones(texts[3])
        return self._cancel(*texts, is_admin=is_admin)  # type: ignore[arg-type]

    def _cancel_anyones(self, call_id: str) -> bool:
        """False where callers have several of that name: it does not say which, as the execution's id would."""
        named = [run for (_, _, name), run in self._by_call_id.items() if name == call_id]
        return len(named) == 1 and named[0].cancel()

    def _cancel(
        self, tenant: str, subject: str, execution_id: str | None, call_id: str | None, *, is_admin: bool
    ) -> bool:
        if execution_id is not None:
            run = self._by_id.get(execution_id)
        else:
            run = self._by_call_id.get((tenant, subject, call_id or ""))
        if run is None:
            return False
        owner = run.call.caller
        if not is_admin and (owner.tenant, owner.subject) != (tenant, subject):
            return False
        return run.cancel()
