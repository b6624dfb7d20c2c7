"""New connections are let in while the ones that there are keep the loop busy."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import uvloop

from app.service import open_service
from app.settings import read_settings
from app.transport.app import create_app
from app.transport.server import ACCEPTED_AT_ONCE, Server
from tests.conftest import places_in

CONNECTIONS = 8 * ACCEPTED_AT_ONCE


def test_many_connections_are_accepted_in_a_turn_of_the_loop(tmp_path: Path) -> None:
    async def turns() -> int:
        async with open_service(read_settings({**places_in(tmp_path), "DRAIN_SECONDS": "0"})) as service:
            server = Server(create_app(service), service, "127.0.0.1", 0)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0)
            peers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(CONNECTIONS)]
            count = 0
            while len(server.server_state.connections) < CONNECTIONS:
                await asyncio.sleep(0)
                count += 1
            for peer in peers:
                peer.close()
            server.stop()
            await serving
            assert not any(one.is_serving() for one in server.servers)
            return count

    assert uvloop.run(turns()) < CONNECTIONS / 4
