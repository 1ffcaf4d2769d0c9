"""Serving a model as it lies on disk now, in place of what was loaded, turning nobody away.

Owns the order: files are looked at, an instance is tried out on what they hold, and only then new
requests go to it and to others like it, while those of before are answered by the instances that
they began with. Invariant: until the switch nothing has changed, so what can't be loaded leaves the
model as it was served. Knows nothing of HTTP.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from server.errors import ServerError
from server.fleet.fleet import Fleet
from server.fleet.instance import Instance
from server.fleet.router import Router
from server.fleet.starts import MOST_FAILURES, StartError
from server.generation import SamplingDefaults
from server.models.files import ModelFiles, ModelWatch
from server.models.in_flight import InFlight
from server.models.source import ModelNotFound, ModelSource, find_model
from server.text.given import GivenText
from server.text.loaded_text import KeptTokenizer, LoadedText
from workers import CheckpointError

log = logging.getLogger("onecopy.server")

_LOOK_S: Final = 0.2


class CannotReload(Exception):
    """The model is served as before. The message says why."""


class Reloader:
    """Of one served model."""

    def __init__(
        self,
        model: str,
        given_text: GivenText,
        fleet: Fleet,
        router: Router,
        watch: ModelWatch,
        turn: asyncio.Lock,
        in_flight: InFlight,
        serve: Callable[[LoadedText, SamplingDefaults], LoadedText | None],
        is_served: Callable[[], bool],
    ):
        """`model` as a person named it, and what goes before its own files; `turn` is held
        by whoever changes the fleet as a whole; `serve` lets requests that come from now on be
        answered by that model, and gives back the text of before; `is_served` says whether there is
        any yet."""
        self._model = model
        self._given_text = given_text
        self._fleet = fleet
        self._router = router
        self._watch = watch
        self._turn = turn
        self._in_flight = in_flight
        self._serve = serve
        self._is_served = is_served
        self._retiring: set[asyncio.Task[None]] = set()

    async def reload(self) -> None:
        """Returns once requests go to what lies there now. Raises CannotReload."""
        async with self._turn:
            if not self._is_served():
                raise CannotReload("no model is served yet: wait until the server is ready")
            if self._fleet.asleep:
                raise CannotReload("the model sleeps: wake it first, `onecopy wake`")
            try:
                source = await asyncio.to_thread(find_model, self._model)
                files = await asyncio.to_thread(
                    ModelFiles.at, source.path, source.given, self._given_text.chat_template
                )
                loaded = await asyncio.to_thread(_load, source, self._given_text)
            except (ModelNotFound, CheckpointError, ServerError) as error:
                raise CannotReload(f"the model is served as before: {error}") from error
            try:
                instance = await self._fleet.try_out(source.path, loaded.tokenizer.path)
                before, mark = self._switch(instance, source, files, loaded)
            except StartError as error:
                loaded.close()
                raise CannotReload(f"the model is served as before: {error}") from error
            except BaseException:
                loaded.close()
                raise
            try:
                await self._fleet.wait_ready(MOST_FAILURES)
            except StartError as error:
                log.warning("fewer instances than wanted serve the new model: %s", error)
            finally:
                self._retire(before, mark)

    def _switch(
        self, instance: Instance, source: ModelSource, files: ModelFiles, loaded: LoadedText
    ) -> tuple[LoadedText, int]:
        """In one step of the event loop. Returns the text of before, and when that was."""
        self._fleet.switch_to(instance, source.path, loaded.tokenizer.path)
        before = self._serve(loaded, source.sampling)
        assert before is not None  # noqa: S101 - the first model was served
        self._watch.files = files
        log.info("the model is served as it lies at %s now", source.path)
        return before, self._in_flight.mark()

    def _retire(self, before: LoadedText, mark: int) -> None:
        """In a task of its own: others may change the fleet meanwhile."""
        work = self._retired(before, mark, self._fleet.model.epoch)
        task = asyncio.get_running_loop().create_task(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retired(self, before: LoadedText, mark: int, epoch: int) -> None:
        """Once the last request of before has its answer, end the instances that gave it, and let
        go of what they were asked with."""
        try:
            while self._in_flight.num_before(mark) or self._router.num_streams_before(epoch):
                await asyncio.sleep(_LOOK_S)
            await self._fleet.retire(epoch)
            while self._fleet.num_before(epoch):
                await asyncio.sleep(_LOOK_S)
        except Exception:
            log.exception("what served the model before could not be ended in order")
        finally:
            before.close()

    async def close(self) -> None:
        """Let go of what is still kept for requests of before."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)


def _load(source: ModelSource, given: GivenText) -> LoadedText:
    tokenizer = KeptTokenizer.of(source.path, given)
    try:
        return LoadedText.of(tokenizer)
    except BaseException:
        tokenizer.close()
        raise
