"""Commands about a server and its instances: serve, scale, ps, verify, stop."""

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Final

import typer

from allocator import (
    Owner,
    ProcessState,
    Role,
    RuntimeDir,
    check_limits,
    remove_leftovers,
)
from server import console
from server.admin.client import AdminClient, AdminError, NoServer
from server.admin.schemas import ADMIN_PATHS, InstanceStatus
from server.cli.memory import show_memory
from server.cli.options import JsonOption, RuntimeDirOption, fail, one_line_errors, print_json
from server.cli.setting_options import Options, settings, takes_settings
from server.console.status import instances_table, status_lines
from server.console.verdict import verdict_lines, verdict_text
from server.log_limit import LogLimit
from server.machine import device_verify, process_memory
from server.machine.capacity import held_there, read_machine
from server.machine.handed_out import seen
from server.machine.plan import PlanFailed
from server.machine.proof import prove
from server.machine.proposal import check_open, propose
from server.machine.verify import MAX_PRIVATE_BYTES
from server.models.source import ModelSource, find_model
from server.processes.stopping import answers_nothing, stop_process
from server.settings import MAX_INSTANCES, Settings

log = logging.getLogger("onecopy.server")

_LOG_FORMAT: Final = "%(asctime)s %(name)s: %(message)s"
_STOP_TIMEOUT_S: Final = 30.0
"""What a process may take to end, beyond what it grants its running requests."""
_LEAST_OPEN_FILES: Final = 128
_OPEN_FILES_AN_INSTANCE: Final = 4
"""Of the server and of the allocator, whatever clients there are."""
_ANSWER_S: Final = 3.0
"""What a server may take to hear that it is to end."""


@takes_settings()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="`demo`, a Hugging Face folder, a .gguf file, or a hub id.", show_default=False
        ),
    ],
    options: Options,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: its file's name.")
    ] = None,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Serve MODEL over an OpenAI-compatible REST API.

    Starts an allocator where none runs, loads the weights once into shared memory, and starts the
    instances that map them. Ends on Ctrl-C or SIGTERM, after the running requests; a second one
    does not wait.
    """
    from server.serve import serve as run_server  # all of FastAPI, which no other command needs

    _log_to_stderr()
    with one_line_errors():
        source = find_model(model)
        told = settings(
            options,
            model=source.path,
            model_named=str(source.given or model),
            model_given=source.given,
            served_model_name=served_model_name or source.name,
            sampling_defaults=source.sampling,
            runtime_dir=RuntimeDir.open(runtime_dir).path,
        )
        _check_open_files(told.num_instances)
        if told.engine.device == "host":
            check_limits(told.memory_limit)
        if told.placement == "auto":
            told = _placed(told, source)
        asyncio.run(run_server(told))


def _placed(told: Settings, source: ModelSource) -> Settings:
    """With what `onecopy plan` proposes. Raises PlanFailed where nothing fits, InvalidSetting."""
    check_open(told.engine)
    held = held_there(told.runtime_dir, told.served_model_name, told.engine.device)
    machine = read_machine(None, told.memory_limit, held)
    with console.err.status(f"reading the headers of {source.name}"):
        proposal = propose(source, told.engine, told.num_instances, machine)
    placement = proposal.placement
    if not placement.fits:
        raise PlanFailed(f"--placement auto finds none. {' '.join(placement.reasons)}")
    options = " ".join(placement.options) or "nothing but the defaults"
    log.info("placement: %s. %s", options, " ".join(placement.reasons))
    return told.model_copy(update={"engine": proposal.engine, "chosen": placement})


def scale(
    instances: Annotated[
        int, typer.Argument(min=1, max=MAX_INSTANCES, help="How many there should be.")
    ],
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Change the number of instances of the running server; surplus ones finish their requests."""
    with one_line_errors():
        status = AdminClient(RuntimeDir.open(runtime_dir, create=False)).scale(instances)
        console.out.print(f"{status.model}: {status.num_wanted} instances wanted; see `onecopy ps`")


def ps(
    memory: Annotated[
        bool, typer.Option("--memory", help="Show the device's memory and who holds it.")
    ] = False,
    events: Annotated[
        int, typer.Option(min=0, max=200, help="With --memory: show so many latest events.")
    ] = 0,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Show the instances: pid, state, model, bytes shared and private; or the memory."""
    with one_line_errors():
        if memory:
            show_memory(RuntimeDir.open(runtime_dir, create=False), events, as_json)
            return
        directory = RuntimeDir.open(runtime_dir, create=False)
        status = AdminClient(directory).status()
        instances = [(one.model, instance) for one in status.models for instance in one.instances]
        pids = [pid for _, one in instances for pid in (one.pid, *one.rank_pids)]
        read = process_memory.read_all(pids, seen(directory))
        memories = dict(zip(pids, read, strict=True))
        if as_json:
            print_json(
                {
                    **status.model_dump(exclude={"instances", "models"}),
                    "models": [one.model_dump(exclude={"instances"}) for one in status.models],
                    "instances": [_with_memory(*one, memories) for one in instances],
                }
            )
            return
        console.out.print(status_lines(status), markup=False)
        console.out.print(instances_table(instances, memories))


def _with_memory(
    model: str,
    instance: InstanceStatus,
    memories: Mapping[int | None, process_memory.ProcessMemory | None],
) -> dict[str, object]:
    """As a program is told of it."""
    return {
        **instance.model_dump(),
        "model": model,
        **_figures(memories.get(instance.pid)),
        "ranks": [
            {"rank": rank, "pid": pid, **_figures(memories.get(pid))}
            for rank, pid in enumerate(instance.rank_pids, 1)
        ],
    }


def _figures(memory: process_memory.ProcessMemory | None) -> dict[str, int | None]:
    return {
        "shared_bytes": memory.shared_bytes if memory else None,
        "private_bytes": memory.private_bytes if memory else None,
        "kv_resident_bytes": memory.kv_bytes if memory else None,
    }


def reload(runtime_dir: RuntimeDirOption = None) -> None:
    """Serve the model as it lies on disk now: new instances are started on it, then those of before
    end after their requests. What can't be loaded leaves the model as it is served."""
    with one_line_errors():
        admin = AdminClient(RuntimeDir.open(runtime_dir, create=False))
        with console.err.status("loading the model anew"):
            status = admin.reload()
        console.out.print(f"{status.model} is served as it lies at {status.path} now", markup=False)


def verify(
    max_private: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Private bytes an instance may have, KV cache aside. Default: {MAX_PRIVATE_BYTES}"
            f", on a GPU {device_verify.MAX_PRIVATE_BYTES}.",
        ),
    ] = None,
    digests: Annotated[
        bool, typer.Option("--digests", help="Also check every tensor's bytes; reads all of them.")
    ] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Prove that all instances map one copy, from the kernel's figures, on a GPU from the driver's;
    exit 1 where they do not."""
    with one_line_errors():
        directory = RuntimeDir.open(runtime_dir, create=False)
        status = AdminClient(directory).status()
        ready = [
            (one, one.pid)
            for model in status.models
            for one in model.instances
            if one.state == "ready" and one.pid
        ]
        named = [process for one, pid in ready for process in _processes_of(one, pid)]
        ranks = {pid: rank for one, _ in ready for rank, pid in enumerate(one.rank_pids, 1)}
        verdict = prove(directory, named, max_private, digests=digests, ranks=ranks)
        if as_json:
            print_json(verdict.model_dump())
        else:
            console.out.print(verdict_text(verdict))
            console.out.print(verdict_lines(verdict), markup=False)
    if not verdict.holds:
        raise typer.Exit(1)


def _processes_of(instance: InstanceStatus, pid: int) -> list[tuple[str, int]]:
    """(name, process) of an instance and its further ranks."""
    ranks = enumerate(instance.rank_pids, 1)
    return [(instance.name, pid), *((f"{instance.name} rank {rank}", pid) for rank, pid in ranks)]


def stop(
    keep_allocator: Annotated[
        bool, typer.Option("--keep-allocator", help="Leave the allocator and its weights.")
    ] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Cut off running requests instead of waiting for them.")
    ] = False,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Stop the server, after its running requests, and then the allocator. Given again while the
    server waits for requests, it waits with it."""
    with one_line_errors():
        directory = RuntimeDir.open(runtime_dir, create=False)
        stopped = []
        roles: tuple[Role, ...] = ("server",) if keep_allocator else ("server", "allocator")
        for role in roles:
            owner = directory.owner(role)
            if owner is None:
                continue
            if role == "server":
                gently = _stop_server(directory, owner, keep_allocator=keep_allocator, now=now)
            else:
                gently = stop_process(owner.process, _STOP_TIMEOUT_S)
            if not gently:
                remove_leftovers(directory, role)
            stopped.append(f"{role} (pid {owner.pid}{'' if gently else ', killed'})")
        if not stopped:
            console.out.print(f"nothing runs in {directory.path}")
            return
        console.out.print(f"stopped {' and '.join(stopped)}", markup=False)


def _check_open_files(num_instances: int) -> None:
    """Fails where as many files as this process may have open are too few to serve with."""
    from server.api.http_server import raise_descriptor_limit

    most = raise_descriptor_limit()
    least = _LEAST_OPEN_FILES + _OPEN_FILES_AN_INSTANCE * num_instances
    if most < least:
        fail(
            f"at most {most} files may be open at once, and {num_instances} instances need some "
            f"{least}: raise the limit, `ulimit -n 4096`"
        )


def _stop_server(directory: RuntimeDir, owner: Owner, *, keep_allocator: bool, now: bool) -> bool:
    """True where it ended by itself; one that does not answer is killed."""
    is_mute = partial(answers_nothing, directory.admin)
    state = ProcessState.of(owner.pid)
    hangs = state is None or state.is_stopped or is_mute()
    patience_s, asked = 0.0, False
    if not hangs:
        admin = AdminClient(directory, _ANSWER_S)
        try:
            if keep_allocator:
                admin.keep_allocator()
            status = admin.stop(now=now)
            patience_s, asked = (0.0 if now else status.drain_timeout_s), True
        except NoServer:  # one that is about to start, or to end
            now = True
        except AdminError as error:  # of another version, perhaps
            console.err.print(f"{error}; it is told to end by a signal", markup=False)
    after = "now" if now or hangs else "after its requests"
    console.err.print(f"stopping the server (pid {owner.pid}) {after}")
    return stop_process(owner.process, patience_s + _STOP_TIMEOUT_S, is_mute, asked=asked)


def _log_to_stderr() -> None:
    handler = console.ConsoleHandler()
    handler.setFormatter(logging.Formatter(_LOG_FORMAT, datefmt="%H:%M:%S"))
    handler.addFilter(LogLimit())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(_is_not_admin)
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)


def _is_not_admin(record: logging.LogRecord) -> bool:
    """uvicorn has one access log for all its servers; `onecopy ps` in a loop should not fill it."""
    path = record.args[2] if isinstance(record.args, tuple) and len(record.args) > 2 else ""
    return path not in ADMIN_PATHS


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """What clients that don't read, or don't write, keep from ending is cut off at the end; uvicorn
    says how many, and then shows the traceback of each as if it were an error."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
