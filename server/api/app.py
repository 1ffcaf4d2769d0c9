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
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server.api.allowed_hosts import AllowedHosts, HostCheck
from server.api.openai import chat, completions, embeddings, errors, models
from server.api.openai.admission import Current, Front
from server.api.openai.body_reader import BodyReader
from server.api.openai.cells import Cells
from server.api.openai.grammar_checks import GrammarChecks
from server.cache_salt import CacheSalts
from server.models.in_flight import InFlight, InFlightCount
from server.version import version as own_version

MAX_BODY_BYTES: Final = 32 << 20


def create_app(
    current: Current,
    cells: Cells,
    *,
    salts: CacheSalts | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    metrics: Callable[[], Awaitable[bytes]] | None = None,
    allowed_hosts: AllowedHosts | None = None,
    in_flight: InFlight | None = None,
) -> FastAPI:
    """The app for what is served at the moment. It owns nothing that needs closing.

    `cells` are where it does what may cost much; `salts` None: all share what was computed.
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
    front = Front(current, cells, GrammarChecks(cells), salts or CacheSalts())
    bodies = BodyReader(front, max_body_bytes)
    for endpoint in (completions, chat, embeddings):
        app.include_router(endpoint.routes(front, bodies))
    app.include_router(models.routes(front))
    if allowed_hosts is not None:
        app.add_middleware(HostCheck, allowed=allowed_hosts)
    if in_flight is not None:
        app.add_middleware(InFlightCount, in_flight=in_flight)

    @app.get("/health")
    async def health() -> Response:
        """200 while at least one instance answers requests, else 503."""
        generators = [one.generator for one in current().values()]
        num_ready = sum(one.num_ready for one in generators)
        if num_ready:
            return JSONResponse({"status": "ok", "num_ready": num_ready})
        status = "asleep" if all(one.asleep for one in generators) else "not_ready"
        return JSONResponse({"status": status, "num_ready": 0}, status_code=503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": own_version()}

    if metrics is not None:

        @app.get("/metrics", include_in_schema=False)
        async def scraped() -> Response:
            return Response(await metrics(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return app
