"""`/docs`: Swagger UI over the OpenAPI document, with scripts and styles of its package, so that the page asks no other
host for anything: it works without the internet, and tells nobody that it was opened.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse

from app.transport.gate import open_to_all
from app.transport.openapi import refusals

FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}

KEPT_S = 86_400
"""By the browser; a new version of the package is seen a day later."""


def mount(app: FastAPI) -> None:
    # Relative, so that all of it is found behind a proxy that adds a prefix.
    page_html = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=app.title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},  # or every visit would tell swagger.io the page's address
    ).body

    @open_to_all
    async def page(request: Request) -> Response:
        return Response(page_html, media_type="text/html")

    app.add_api_route(
        "/docs",
        page,
        methods=["GET"],
        tags=["documents"],
        operation_id="getDocs",
        summary="This document as a page",
        description="Swagger UI, which needs nothing from other hosts.",
        response_class=Response,
        responses={
            200: {"description": "A page", "content": {"text/html": {"schema": {"type": "string"}}}},
            **refusals([403]),
        },
    )
    for name, media_type in FILES.items():
        _mount_file(app, name, media_type)


def _mount_file(app: FastAPI, name: str, media_type: str) -> None:
    """Part of the page and not of the API: no client is to have a function for it."""
    path = Path(str(resources.files("fastapi_swagger"))) / "resources" / name

    @open_to_all
    async def file(request: Request) -> Response:
        return FileResponse(path, media_type=media_type, headers={"cache-control": f"max-age={KEPT_S}"})

    app.add_api_route(f"/docs/{name}", file, methods=["GET"], include_in_schema=False)
