"""`GET /v1/models` and `GET /v1/models/{id}`: what is served."""

from fastapi import APIRouter

from server.api.openai.admission import Front
from server.api.openai.replies import Model, ModelList
from server.errors import NotReady
from server.models.serving import Serving


def routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[_shown(one) for one in front.current().values()])

    # A name may hold slashes.
    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Model:
        return _shown(front.named(name))

    return router


def _shown(serving: Serving) -> Model:
    model = Model(id=serving.model_name, created=serving.created)
    try:
        facts = serving.generator.facts
    except NotReady:  # it is served all the same, as soon as an instance has loaded it
        return model
    return model.model_copy(update={"max_model_len": facts.max_model_len, "task": facts.task})
