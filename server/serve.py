"""`onecopy serve`: everything started in order, and taken down in the reverse order.

Owns the order. Invariants: what can be refused at once (directory, port, model) is refused before
anything is started; however the start or the serving ends, nothing that was started here is left.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Final

from allocator import RuntimeDir
from server import console
from server.address import bind, bind_unix, in_use, unbind
from server.admin.app import create_admin_app
from server.admin.engine_metrics import InstanceMetrics
from server.admin.metrics import Metrics
from server.admin.schemas import ServerStatus
from server.api.allowed_hosts import AllowedHosts
from server.api.app import create_app
from server.api.http_server import HTTPServer, most_connections, raise_descriptor_limit
from server.api.openai.cells import Cells
from server.background import Background
from server.cache_salt import CacheSalts
from server.console.start import StartDisplay, curl_line, ready_lines
from server.fleet.daemons import AllocatorProcess
from server.machine import process_memory
from server.machine.handed_out import seen
from server.models.files import ModelFiles
from server.models.in_flight import InFlight
from server.models.served import ServedModel
from server.models.table import Models
from server.settings import Settings
from server.text.loaded_text import KeptTokenizer
from server.version import version

log = logging.getLogger("onecopy.server")

_ADMIN_CONNECTIONS: Final = 32


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second one does not wait for running requests.

    Raises AddressInUse, AllocatorError, CheckpointError, StartError, ServerError, WorkEnded.
    """
    num_descriptors = raise_descriptor_limit()
    async with contextlib.AsyncExitStack() as stack:
        runtime_dir = RuntimeDir.open(settings.runtime_dir)
        files = await asyncio.to_thread(
            ModelFiles.at, settings.model, settings.model_given, settings.chat_template
        )
        # A tokenizer that is missing is no reason to load first.
        tokenizer = await asyncio.to_thread(KeptTokenizer.of, settings.model, settings.given_text)
        stack.callback(tokenizer.close)
        lock = runtime_dir.lock("server")
        stack.callback(lock.release)
        http_socket, url = bind(settings)
        stack.callback(unbind, http_socket, settings.uds)
        stop = _Stop()
        stack.enter_context(stop.on_signals())
        allocator = AllocatorProcess(
            runtime_dir, settings.memory_limit, settings.engine.device, settings.hang_timeout_s
        )
        stack.push_async_callback(allocator.stop_if_unused)
        if not await stop.unless_stopped(allocator.find_or_start()):
            return

        cells = Cells()
        stack.callback(cells.close)
        in_flight, background = InFlight(), Background()
        models = Models([ServedModel(settings, runtime_dir, files, tokenizer, in_flight)])
        stack.push_async_callback(background.close)
        stack.push_async_callback(models.close)
        models.launch()
        background.keep(
            "the watch over the allocator", lambda: allocator.watch(lambda: models.awaits_allocator)
        )
        metrics = Metrics(runtime_dir, InstanceMetrics(lambda: models.instances))
        stack.callback(metrics.close)
        admin_app = create_admin_app(
            models, allocator, metrics, stop.ask, settings.drain_timeout_s, url
        )
        admin = HTTPServer(admin_app, bind_unix(runtime_dir.admin), most=_ADMIN_CONNECTIONS)
        stack.push_async_callback(admin.close)
        stack.callback(runtime_dir.admin.unlink, missing_ok=True)
        await admin.start()
        if not await stop.unless_stopped(_all_served(models)):
            return

        app = create_app(
            models.serving,
            cells,
            salts=CacheSalts(settings.prefix_cache_salt),
            metrics=metrics.scrape,
            allowed_hosts=(
                None if settings.uds else AllowedHosts(settings.host, settings.allowed_hosts)
            ),
            in_flight=in_flight,
        )
        most = most_connections(num_descriptors, settings.num_instances)
        http = HTTPServer(app, http_socket, most=most)
        stack.push_async_callback(http.close)
        stack.push_async_callback(models.end_requests)
        try:
            await http.start()
        except OSError as error:  # bound before, and another has begun to listen meanwhile
            raise in_use(settings, error) from error
        background.need("the HTTP server", http.ended)
        background.need("the admin server", admin.ended)
        lock.announce(url)
        await _print_ready(await admin_app.state.status(), models, settings)
        await stop.unless_stopped(background.run())

        log.info("shutting down: waiting for %d requests", models.num_streams)
        if not await stop.unless_stopped_again(models.drain(settings.drain_timeout_s)):
            log.warning("stopped without waiting")


async def _all_served(models: Models) -> None:
    """One after the other is waited for; all start at once."""
    for one in models:
        with StartDisplay(one.name) as display:
            await one.until_served(partial(_show, display, one))


def _show(display: StartDisplay, served: ServedModel) -> None:
    display.show(served.fleet.instances)


async def _print_ready(status: ServerStatus, models: Models, settings: Settings) -> None:
    mapped = await asyncio.to_thread(seen, RuntimeDir(settings.runtime_dir))
    memories = process_memory.read_all((one.pid for one in status.instances), mapped)
    uds = str(settings.uds) if settings.uds else None
    first = models.serving()[status.model]
    curl = curl_line(
        status.url,
        uds,
        first.model_name,
        first.text.has_chat_template,
        first.generator.facts.task == "embed",
    )
    chosen = RuntimeDir.default_path() != settings.runtime_dir
    runtime_dir = str(settings.runtime_dir) if chosen else None
    lines = ready_lines(status, memories, curl, version(), runtime_dir)
    console.out.print(lines, markup=False)


class _Stop:
    """Signals as events: the first asks to drain, the second not to wait."""

    def __init__(self) -> None:
        self._first = asyncio.Event()
        self._second = asyncio.Event()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        self.ask(now=self._first.is_set())

    def ask(self, now: bool) -> None:
        """To drain, or not to wait; asked again for the same, nothing changes."""
        self._first.set()
        if now:
            self._second.set()

    async def unless_stopped(self, work: Coroutine[object, object, None]) -> bool:
        """True where `work` ended by itself; its error is raised."""
        return await self._race(work, self._first)

    async def unless_stopped_again(self, work: Coroutine[object, object, None]) -> bool:
        """As `unless_stopped`, for the second signal."""
        return await self._race(work, self._second)

    @staticmethod
    async def _race(work: Coroutine[object, object, None], event: asyncio.Event) -> bool:
        working = asyncio.ensure_future(work)
        stopped = asyncio.create_task(event.wait())
        try:
            await asyncio.wait([working, stopped], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return True
            return False
        finally:
            stopped.cancel()
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
