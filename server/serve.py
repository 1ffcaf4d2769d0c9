"""`onecopy serve`: everything started in order, and taken down in the reverse order.

Owns the order. Invariants: what can be refused at once (directory, port, model) is refused before
anything is started; however the start or the serving ends, nothing that was started here is left.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI

from allocator import RuntimeDir
from server import console
from server.admin.app import create_admin_app
from server.admin.engine_metrics import InstanceFigures
from server.admin.metrics import Metrics
from server.api.allowed_hosts import AllowedHosts
from server.api.app import Serving, create_app
from server.api.cells import Cells
from server.api.grammar_checks import GrammarChecks
from server.api.http_server import HTTPServer, most_connections, raise_descriptor_limit
from server.background import Background
from server.cache_salt import CacheSalts
from server.fleet.daemons import AllocatorProcess
from server.fleet.fleet import Fleet
from server.fleet.router import ModelAsItWas, Router
from server.fleet.sleep import Sleeper
from server.generation import SamplingDefaults
from server.machine import process_memory
from server.machine.handed_out import seen
from server.models.files import ModelFiles, ModelWatch
from server.models.in_flight import InFlight
from server.models.reload import Reloader
from server.settings import Settings
from server.text.loaded_text import KeptTokenizer, LoadedText
from server.text.text import Text
from server.version import version
from workers.messages import Task

log = logging.getLogger("onecopy.server")

_SHOW_EVERY_S: Final = 0.2
_ADMIN_CONNECTIONS: Final = 32


class AddressInUse(Exception):
    """The HTTP address can't be had. The message names the fix."""


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second one does not wait for running requests.

    Raises AddressInUse, AllocatorError, CheckpointError, StartError, ServerError, WorkEnded.
    """
    num_descriptors = raise_descriptor_limit()
    async with contextlib.AsyncExitStack() as stack:
        runtime_dir = RuntimeDir.open(settings.runtime_dir)
        files = await asyncio.to_thread(ModelFiles.at, settings.model, settings.model_given)
        # A tokenizer that is missing is no reason to load first.
        tokenizer = await asyncio.to_thread(
            KeptTokenizer.of, settings.model, settings.chat_template
        )
        stack.callback(tokenizer.close)
        lock = runtime_dir.lock("server")
        stack.callback(lock.release)
        http_socket, url = _bind(settings)
        stack.callback(_unbind, http_socket, settings.uds)
        stop = _Stop()
        stack.enter_context(stop.on_signals())
        allocator = AllocatorProcess(
            runtime_dir, settings.memory_limit, settings.device, settings.hang_timeout_s
        )
        stack.push_async_callback(allocator.stop_if_unused)
        if not await stop.unless_stopped(allocator.find_or_start()):
            return

        router = Router(settings)
        fleet = Fleet(settings, runtime_dir, router.listeners, tokenizer.path)
        router.bind(fleet)
        background = Background()
        stack.push_async_callback(background.close)
        stack.push_async_callback(fleet.close)
        fleet.launch()
        background.keep(
            "the watch over the allocator", lambda: allocator.watch(lambda: fleet.awaits_allocator)
        )
        cells = Cells()
        stack.callback(cells.close)
        turn, watch = asyncio.Lock(), ModelWatch(files)
        served = _Served(settings, router, cells)
        stack.callback(served.close)
        in_flight = InFlight(lambda: fleet.epoch)
        sleeper = Sleeper(fleet, router, runtime_dir, settings.drain_timeout_s, turn)
        reloader = Reloader(
            settings.model_named,
            settings.chat_template,
            fleet,
            router,
            watch,
            turn,
            in_flight,
            served.serve,
            lambda: served.is_there,
        )
        stack.push_async_callback(reloader.close)
        metrics = Metrics(runtime_dir, InstanceFigures(lambda: fleet.instances))
        stack.callback(metrics.close)
        admin_app = create_admin_app(
            fleet, router, sleeper, allocator, metrics, watch, reloader, stop.ask, settings, url
        )
        admin = HTTPServer(admin_app, _bind_unix(runtime_dir.admin), most=_ADMIN_CONNECTIONS)
        stack.push_async_callback(admin.close)
        stack.callback(runtime_dir.admin.unlink, missing_ok=True)
        await admin.start()

        text_task = asyncio.create_task(asyncio.to_thread(LoadedText.of, tokenizer))
        stack.push_async_callback(_settled, text_task)
        if not await stop.unless_stopped(_started(fleet, settings, text_task)):
            return
        served.serve(await text_task, settings.sampling_defaults)
        app = create_app(
            served.current,
            metrics=metrics.scrape,
            allowed_hosts=(
                None if settings.uds else AllowedHosts(settings.host, settings.allowed_hosts)
            ),
            in_flight=in_flight,
        )
        most = most_connections(num_descriptors, settings.num_instances)
        http = HTTPServer(app, http_socket, most=most)
        stack.push_async_callback(http.close)
        stack.push_async_callback(router.close)
        try:
            await http.start()
        except OSError as error:  # bound before, and another has begun to listen meanwhile
            raise _in_use(settings, error) from error
        background.need("the HTTP server", http.ended)
        background.need("the admin server", admin.ended)
        lock.announce(url)
        text = served.current().text
        await _print_ready(admin_app, settings, url, text, router.facts.task)
        await stop.unless_stopped(background.run())

        log.info("shutting down: waiting for %d requests", router.num_streams)
        router.draining = True
        drain = _drain(router, fleet, settings.drain_timeout_s)
        if not await stop.unless_stopped_again(drain):
            log.warning("stopped without waiting")


class _Served:
    """What is served now, and what was before."""

    def __init__(self, settings: Settings, router: Router, cells: Cells):
        self._settings = settings
        self._router = router
        self._cells = cells
        self._grammars = GrammarChecks(cells)
        self._salts = CacheSalts(settings.prefix_cache_salt)
        self._created = int(time.time())
        self._loaded: LoadedText | None = None
        self._serving: Serving | None = None

    def serve(self, loaded: LoadedText, sampling: SamplingDefaults) -> LoadedText | None:
        """From now on requests are for the fleet's model as it is now, with this text. Gives back
        that of before."""
        before, self._loaded = self._loaded, loaded
        self._serving = Serving(
            generator=ModelAsItWas(self._router),
            text=loaded.text,
            model_name=self._settings.served_model_name,
            created=self._created,
            cells=self._cells,
            grammars=self._grammars,
            sampling_defaults=sampling,
            salts=self._salts,
        )
        return before

    @property
    def is_there(self) -> bool:
        """Whether the first model is served."""
        return self._serving is not None

    def current(self) -> Serving:
        """Once the first model is served."""
        assert self._serving is not None  # noqa: S101 - requests come after it
        return self._serving

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()


async def _started(fleet: Fleet, settings: Settings, text: "asyncio.Task[LoadedText]") -> None:
    """Until the instances are ready; or what is wrong with the tokenizer, as soon as it shows."""
    with console.StartDisplay(settings.served_model_name) as display:
        waiting = asyncio.create_task(fleet.wait_ready())
        try:
            while not waiting.done():
                tasks: list[asyncio.Task[Any]] = [waiting, *([] if text.done() else [text])]
                await asyncio.wait(
                    tasks, timeout=_SHOW_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                if text.done():
                    text.result()
                display.show(fleet.instances)
            await waiting
        finally:
            waiting.cancel()


async def _drain(router: Router, fleet: Fleet, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    if not await router.wait_idle(timeout_s):
        log.warning("%d requests did not end within %.0f s", router.num_streams, timeout_s)
    await fleet.drain(max(1.0, deadline - time.monotonic()))


async def _settled(task: "asyncio.Task[LoadedText]") -> None:
    """Until it has ended. Its error is of no interest to who waits for this."""
    await asyncio.gather(task, return_exceptions=True)


async def _print_ready(
    admin_app: FastAPI, settings: Settings, url: str, text: Text, task: Task
) -> None:
    status = await admin_app.state.status()
    mapped = await asyncio.to_thread(seen, RuntimeDir(settings.runtime_dir))
    memories = [
        process_memory.read(one.pid, mapped) if one.pid else None for one in status.instances
    ]
    uds = str(settings.uds) if settings.uds else None
    name, chat = settings.served_model_name, text.has_chat_template
    curl = console.curl_line(url, uds, name, chat, task == "embed")
    chosen = RuntimeDir.default_path() != settings.runtime_dir
    runtime_dir = str(settings.runtime_dir) if chosen else None
    lines = console.ready_lines(status, memories, curl, version(), runtime_dir)
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


def _bind(settings: Settings) -> tuple[socket.socket, str]:
    if settings.uds is not None:
        return _bind_unix(settings.uds), f"unix:{settings.uds}"
    try:
        infos = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = infos[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise _in_use(settings, error) from error
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return bound, f"http://{host}:{bound.getsockname()[1]}"


def _in_use(settings: Settings, error: OSError) -> AddressInUse:
    return AddressInUse(
        f"can't serve on {settings.uds or f'{settings.host}:{settings.port}'}: {error.strerror}. "
        "Choose another --port (or --host), or stop what uses it."
    )


def _bind_unix(path: Path) -> socket.socket:
    if os.fsencode(path).decode(errors="ignore") != str(path):
        raise AddressInUse(f"the name of {os.fsencode(path)!r} is no UTF-8: choose another --uds")
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(os.fspath(path)) == 0:
                raise AddressInUse(f"another server answers on {path}: choose another --uds")
        if path.is_socket():
            path.unlink()  # left behind by a server that is gone
        bound.bind(os.fspath(path))
        path.chmod(0o600)
    except OSError as error:
        bound.close()
        raise AddressInUse(f"can't serve on {path}: {error.strerror or error}") from error
    return bound


def _unbind(bound: socket.socket, uds: Path | None) -> None:
    bound.close()
    if uds is not None:
        uds.unlink(missing_ok=True)
