"""REST: discovery and one execute route, over the same executor as the JSON-RPC door."""

from __future__ import annotations

from fastapi import FastAPI

from app.service import Service
from app.transport.methods import Methods


def mount(app: FastAPI, service: Service, methods: Methods) -> None:
    """Add the REST routes and the documents."""
