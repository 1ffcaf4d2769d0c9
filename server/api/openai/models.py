"""`GET /v1/models` and `GET /v1/models/{id}`: the one model that is served."""

from fastapi import APIRouter

from server.api.openai.admission import Current, check_model
from server.api.openai.replies import Model, ModelList
from server.errors import NotReady


def routes(current: Current) -> APIRouter:
    router = APIRouter()

    def served() -> Model:
        serving = current()
        model = Model(id=serving.model_name, created=serving.created)
        try:
            facts = serving.generator.facts
        except NotReady:  # it is served all the same, as soon as an instance has loaded it
            return model
        return model.model_copy(update={"max_model_len": facts.max_model_len, "task": facts.task})

    @router.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[served()])

    # A name may hold slashes.
    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Model:
        check_model(current(), name)
        return served()

    return router
