"""The HTTP application: which paths there are, and what holds for all of them.

Invariant: every answer outside 2xx (but that of /health) has an OpenAI error body, and no request's
body is read further than `max_body_bytes`. There are no CORS headers: a web page of another origin
can't use the API. Knows nothing of how tokens are made (`Generator`) or text is written (`Text`).
"""

import asyncio
import importlib.metadata
from collections.abc import Callable
from typing import Final

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from server.metrics import CONTENT_TYPE
from server.openai import chat, completions, embeddings, errors, models
from server.openai.admission import Current, Serving
from server.openai.body_limit import BodyLimit

__all__ = ["MAX_BODY_BYTES", "Current", "Serving", "create_app"]

MAX_BODY_BYTES: Final = 32 << 20


def create_app(
    current: Current,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    metrics: Callable[[], bytes] | None = None,
) -> FastAPI:
    """The app for one served model, as it is at the moment. It owns nothing that needs closing.
    `metrics` makes what a Prometheus scrape gets; it may block."""
    app = FastAPI(
        title="onecopy",
        version=_version(),
        # The pages would load their scripts from elsewhere; /openapi.json is there.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    errors.install(app)
    for routes in (completions.routes, chat.routes, embeddings.routes, models.routes):
        app.include_router(routes(current))

    @app.get("/health")
    async def health() -> Response:
        """200 while at least one instance answers requests, else 503."""
        generator = current().generator
        num_ready = generator.num_ready
        if num_ready:
            return JSONResponse({"status": "ok", "num_ready": num_ready})
        status = "asleep" if generator.asleep else "not_ready"
        return JSONResponse({"status": status, "num_ready": 0}, status_code=503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": _version()}

    if metrics is not None:

        @app.get("/metrics", include_in_schema=False)
        async def scraped() -> Response:
            return Response(await asyncio.to_thread(metrics), media_type=CONTENT_TYPE)

    return app


def _version() -> str:
    try:
        return importlib.metadata.version("onecopy")
    except importlib.metadata.PackageNotFoundError:
        return "0+uninstalled"  # run from a checkout
