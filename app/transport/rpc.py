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
from app.transport.jsonrpc import Dispatcher
from app.transport.request import RequestContext

RPC_PATH = "/api/v1/jsonrpc"


class JsonRpcDoor(Door):
    """POST /api/v1/jsonrpc."""

    reads_headers = False

    def __init__(self, dispatcher: Dispatcher, *shared: Any) -> None:
        super().__init__(*shared)
        self._dispatcher = dispatcher

    def begin_asgi(self, body: bytes, context: RequestContext, scope: Scope, send: Send, then: Replied) -> Steps | None:
        context.idempotency_key = header_key(scope["headers"])
        return self.begin(body, context, scope, then)

    def begin(self, body: bytes, context: RequestContext, scope: Scope, then: Replied) -> Steps | None:
        def answered(answer: bytes | None) -> None:
            try:
                reply = _replied(answer, context)
            except Exception as error:
                reply = self.failed(error)
            then(reply)

        steps = self._dispatcher.begin(body, context, answered)
        return None if steps is None else _reply_of(steps, context)


async def _reply_of(steps: Coroutine[Any, Any, bytes | None], context: RequestContext) -> Reply:
    answer = await steps
    if context.commits is not None:
        await context.committed()
    return _replied(answer, context)


def _replied(answer: bytes | None, context: RequestContext) -> Reply:
    if context.draining:
        return draining_reply(answer or b"")
    return NO_CONTENT if answer is None else json_reply(context, answer)
