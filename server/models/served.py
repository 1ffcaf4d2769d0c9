"""One model of a server: its instances, the router before them, its text, its files, and what can
be done with it as a whole.

Owns these parts and their end. Invariant: only one thing is done with a model as a whole at a time:
it is put to sleep, woken, or loaded anew.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from allocator import RuntimeDir
from server.fleet.fleet import Fleet
from server.fleet.model_as_it_was import ModelAsItWas
from server.fleet.router import Router
from server.fleet.sleep import Sleeper
from server.generation import SamplingDefaults
from server.models.files import ModelFiles, ModelWatch
from server.models.in_flight import InFlight
from server.models.reload import Reloader
from server.models.serving import Serving
from server.settings import Settings
from server.text.loaded_text import KeptTokenizer, LoadedText

log = logging.getLogger("onecopy.server")

_SHOW_EVERY_S: Final = 0.2


class ServedModel:
    """By the name that clients call it."""

    def __init__(
        self,
        settings: Settings,
        runtime_dir: RuntimeDir,
        files: ModelFiles,
        tokenizer: KeptTokenizer,
        in_flight: InFlight,
    ):
        """`files` and `tokenizer` are those that lie at the settings' `model`."""
        self.name = settings.served_model_name
        self.placement = settings.chosen
        self.router = Router(settings)
        self.fleet = Fleet(settings, runtime_dir, self.router.listeners, tokenizer.path)
        self.router.bind(self.fleet)
        self.watch = ModelWatch(files)
        turn = asyncio.Lock()
        self.sleeper = Sleeper(self.fleet, self.router, runtime_dir, settings.drain_timeout_s, turn)
        self.reloader = Reloader(
            settings.model_named,
            settings.given_text,
            self.fleet,
            self.router,
            self.watch,
            turn,
            in_flight,
            self._serve,
            lambda: self.serving is not None,
        )
        self.serving: Serving | None = None
        """As it is served now; None before it is."""
        self._sampling = settings.sampling_defaults
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._loaded: LoadedText | None = None
        self._reading: asyncio.Task[LoadedText] | None = None

    def launch(self) -> None:
        """Begin to start the instances, and to read the text."""
        self.fleet.launch()
        self._reading = asyncio.create_task(asyncio.to_thread(LoadedText.of, self._tokenizer))

    async def until_served(self, show: Callable[[], None]) -> None:
        """Until the instances are ready and the text is read; `show` is called meanwhile. Raises
        StartError, or what is wrong with the text, as soon as it is found."""
        assert self._reading is not None  # noqa: S101 - it was launched
        waiting = asyncio.create_task(self.fleet.wait_ready())
        try:
            while not waiting.done():
                tasks: list[asyncio.Task[Any]] = [waiting]
                tasks += [] if self._reading.done() else [self._reading]
                await asyncio.wait(
                    tasks, timeout=_SHOW_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                if self._reading.done():
                    self._reading.result()
                show()
            await waiting
        finally:
            waiting.cancel()
        self._serve(await self._reading, self._sampling)

    def _serve(self, loaded: LoadedText, sampling: SamplingDefaults) -> LoadedText | None:
        """From now on requests are for the fleet's model as it is now, with this text. Gives back
        that of before."""
        before, self._loaded = self._loaded, loaded
        self.serving = Serving(
            model_name=self.name,
            generator=ModelAsItWas(self.router),
            text=loaded.text,
            created=self._created,
            sampling_defaults=sampling,
        )
        return before

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and let what runs finish, within `timeout_s`."""
        self.router.draining = True
        deadline = time.monotonic() + timeout_s
        if not await self.router.wait_idle(timeout_s):
            log.warning("%d requests did not end within %.0f s", self.router.num_streams, timeout_s)
        await self.fleet.drain(max(1.0, deadline - time.monotonic()))

    async def close(self) -> None:
        """End all of it: nobody asks any more."""
        await self.router.close()
        if self._reading is not None:  # its error was raised, or is of no interest now
            await asyncio.gather(self._reading, return_exceptions=True)
        await self.reloader.close()
        if self._loaded is not None:
            self._loaded.close()
        await self.fleet.close()
