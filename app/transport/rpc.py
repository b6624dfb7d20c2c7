"""The JSON-RPC door: a body to the dispatcher, and its answer as one HTTP response. Knows no method and no tool."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from app.transport.door import (
    NO_CONTENT,
    Door,
    Replied,
    Reply,
    Scope,
    Send,
    Steps,
    draining_reply,
    header_key,
    json_reply,
)
from app.transport.jsonrpc import Dispatcher, RequestContext

RPC_PATH = "/api/v1/jsonrpc"


class JsonRpcDoor(Door):
    """POST /api/v1/jsonrpc."""

    reads_headers = False

    def __init__(self, dispatcher: Dispatcher, *shared: Any) -> None:
        super().__init__(*shared)
        self._dispatcher = dispatcher

    async def _reply_or_stream(self, body: bytes, context: RequestContext, scope: Scope, send: Send) -> Reply | None:
        context.idempotency_key = header_key(scope["headers"])  # the lane takes no request that has one
        return await self.reply(body, context, scope)

    def begin(self, body: bytes, context: RequestContext, scope: Scope, then: Replied) -> Steps | None:
        def answered(answer: bytes | None) -> None:
            try:
                reply = _replied(answer, context)
            except Exception as error:
                reply = self.failed(error)
            then(reply)

        steps = self._dispatcher.begin(body, context, answered)
        return None if steps is None else _reply_of(steps, context)

    async def reply(self, body: bytes, context: RequestContext, scope: Scope) -> Reply:
        return await _reply_of(self._dispatcher.dispatch(body, context), context)


async def _reply_of(steps: Coroutine[Any, Any, bytes | None], context: RequestContext) -> Reply:
    answer = await steps
    if context.commits is not None:
        await context.committed()
    return _replied(answer, context)


def _replied(answer: bytes | None, context: RequestContext) -> Reply:
    if context.draining:
        return draining_reply(answer or b"")
    return NO_CONTENT if answer is None else json_reply(context, answer)
