"""The HTTP application: which paths there are, and what holds for all of them.

Invariant: every answer outside 2xx (but that of /health) has an OpenAI error body, and no request's
body is read further than `max_body_bytes`. There are no CORS headers, and names that are not ours
are refused: a web page of another origin can't use the API, nor read what it answers. Knows nothing
of how tokens are made (`Generator`) or text is written (`Text`).
"""

from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from server.admin.metrics import CONTENT_TYPE
from server.api.allowed_hosts import AllowedHosts, HostCheck
from server.api.openai import chat, completions, embeddings, errors, models
from server.api.openai.admission import Current, Serving
from server.api.openai.body_reader import BodyReader
from server.models.in_flight import InFlight, InFlightCount
from server.version import version as own_version

__all__ = ["MAX_BODY_BYTES", "Current", "Serving", "create_app"]

MAX_BODY_BYTES: Final = 32 << 20


def create_app(
    current: Current,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    metrics: Callable[[], Awaitable[bytes]] | None = None,
    allowed_hosts: AllowedHosts | None = None,
    in_flight: InFlight | None = None,
) -> FastAPI:
    """The app for one served model, as it is at the moment. It owns nothing that needs closing.
    `metrics` makes what a Prometheus scrape gets. `allowed_hosts` None: whoever calls it may call
    it anything, since no web page can reach it. `in_flight` counts the requests."""
    app = FastAPI(
        title="onecopy",
        version=own_version(),
        # The pages would load their scripts from elsewhere; /openapi.json is there.
        docs_url=None,
        redoc_url=None,
    )
    errors.install(app)
    bodies = BodyReader(current, max_body_bytes)
    for endpoint in (completions, chat, embeddings):
        app.include_router(endpoint.routes(current, bodies))
    app.include_router(models.routes(current))
    if allowed_hosts is not None:
        app.add_middleware(HostCheck, allowed=allowed_hosts)
    if in_flight is not None:
        app.add_middleware(InFlightCount, in_flight=in_flight)

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
        return {"version": own_version()}

    if metrics is not None:

        @app.get("/metrics", include_in_schema=False)
        async def scraped() -> Response:
            return Response(await metrics(), media_type=CONTENT_TYPE)

    return app
