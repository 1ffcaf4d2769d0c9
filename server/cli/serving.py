"""Commands about a server and its instances: serve, scale, ps, verify, stop."""

import asyncio
import logging
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from allocator import (
    Owner,
    ProcessState,
    Role,
    RuntimeDir,
    check_limits,
    parse_bytes,
    remove_leftovers,
)
from server import console
from server.admin.app import ADMIN_PATHS, AdminClient, AdminError, NoServer, ServerStatus
from server.api.http_server import raise_descriptor_limit
from server.cli.memory import show_memory
from server.cli.options import JsonOption, RuntimeDirOption, fail, one_line_errors, print_json
from server.log_limit import LogLimit
from server.machine import device_verify, process_memory
from server.machine.handed_out import seen
from server.machine.proof import prove
from server.machine.verify import MAX_PRIVATE_BYTES
from server.models.source import find_model
from server.processes.stopping import answers_nothing, stop_process
from server.serve import serve as run_server
from server.settings import Settings
from workers import KERNEL_SETS, KERNELS_VARIABLE

_LOG_FORMAT: Final = "%(asctime)s %(name)s: %(message)s"
_STOP_TIMEOUT_S: Final = 30.0
"""What a process may take to end, beyond what it grants its running requests."""
_LEAST_OPEN_FILES: Final = 128
_OPEN_FILES_AN_INSTANCE: Final = 4
"""Of the server and of the allocator, whatever clients there are."""
_ANSWER_S: Final = 3.0
"""What a server may take to hear that it is to end."""


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="`demo`, a Hugging Face folder, a .gguf file, or a hub id.", show_default=False
        ),
    ],
    instances: Annotated[
        int,
        typer.Option(min=1, max=256, help="Engines to run; they share one copy of the weights."),
    ] = 2,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to serve on; 0 picks a free one.")
    ] = 8000,
    uds: Annotated[
        Path | None, typer.Option(help="Serve on this Unix socket instead of host and port.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which clients may call the server, as `api.example.com`, "
            "`*.example.com` or `*`; can be given several times. Addresses, localhost and the "
            "machine's own name need not be named.",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longest prompt and answer together, in tokens. Default: the model's own."
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Sequences that run at once in one instance.")
    ] = 16,
    max_queued: Annotated[
        int,
        typer.Option(min=1, help="Requests that may wait beyond those; one more is refused (503)."),
    ] = 256,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompt tokens that one step computes: more take in prompts faster, fewer hold up "
            "running streams less.",
        ),
    ] = 384,
    attention_workspace: Annotated[
        str, typer.Option(help="What attention may take for itself in a step, as 256MiB.")
    ] = "256MiB",
    num_speculative_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            max=16,
            help="Guess up to so many tokens ahead by looking up what the text has said before, "
            "and check them in one step. The text is the same.",
        ),
    ] = 0,
    prefix_caching: Annotated[
        bool,
        typer.Option(
            help="Let instances find what any of them has computed of a common beginning."
        ),
    ] = True,
    cpu_kernels: Annotated[
        str,
        typer.Option(
            envvar=KERNELS_VARIABLE,
            help=f"Instructions to use: {', '.join(KERNEL_SETS)}; auto: the best there are.",
        ),
    ] = "auto",
    prefix_cache_salt: Annotated[
        str,
        typer.Option(
            help="Who finds what was computed: none (all find all), key (requests of the same API "
            "key), random (requests of this start of the server)."
        ),
    ] = "none",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, bfloat16, float16 or float32. auto: the checkpoint's; GGUF: bfloat16."
        ),
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of one instance. Default: those that compute share the cores."
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: its file's name.")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file with the chat template to use in place of the model's own, in Jinja.",
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="What the allocator may use, as 800M or 20GiB, where this starts one."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where the weights are: host, cuda:N or cuda:GPU-UUID.")
    ] = "host",
    map_files: Annotated[
        bool,
        typer.Option(
            "--map-files",
            help="Map safetensors that need no conversion instead of copying them: starts at once, "
            "but the files must not be changed meanwhile.",
        ),
    ] = False,
    drain_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that running requests get at the end.")
    ] = 30.0,
    hang_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds for which an instance may be stopped before another takes its place; "
            "0: for ever, as for a debugger.",
        ),
    ] = 3.0,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Serve MODEL over an OpenAI-compatible REST API.

    Starts an allocator where none runs, loads the weights once into shared memory, and starts the
    instances that map them. Ends on Ctrl-C or SIGTERM, after the running requests; a second one
    does not wait.
    """
    _log_to_stderr()
    with one_line_errors():
        source = find_model(model)
        settings = Settings(
            model=source.path,
            model_named=str(source.given or model),
            model_given=source.given,
            served_model_name=served_model_name or source.name,
            chat_template=chat_template,
            runtime_dir=RuntimeDir.open(runtime_dir).path,
            host=host,
            port=port,
            uds=uds.absolute() if uds else None,
            allowed_hosts=tuple(allowed_host or ()),
            num_instances=instances,
            sampling_defaults=source.sampling,
            dtype=dtype,  # type: ignore[arg-type]  # pydantic checks it
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_queued=max_queued,
            token_budget=max_num_batched_tokens,
            attention_workspace=parse_bytes(attention_workspace),
            num_speculative_tokens=num_speculative_tokens,
            prefix_caching=prefix_caching,
            cpu_kernels=cpu_kernels,  # type: ignore[arg-type]  # pydantic checks it
            prefix_cache_salt=prefix_cache_salt,  # type: ignore[arg-type]  # as dtype
            num_threads=threads or default_threads(instances),
            shares_cores=threads is None,
            drain_timeout_s=drain_timeout,
            hang_timeout_s=hang_timeout,
            memory_limit=None if memory_limit is None else parse_bytes(memory_limit),
            device=device,
            map_files=map_files,
        )
        _check_open_files(instances)
        if settings.device == "host":
            check_limits(settings.memory_limit)
        asyncio.run(run_server(settings))


def scale(
    instances: Annotated[int, typer.Argument(min=1, max=256, help="How many there should be.")],
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
        memories = _memories(status, seen(directory))
        if as_json:
            print_json(
                {
                    **status.model_dump(exclude={"instances"}),
                    "instances": [
                        {
                            **instance.model_dump(),
                            "model": status.model,
                            "shared_bytes": memory.shared_bytes if memory else None,
                            "private_bytes": memory.private_bytes if memory else None,
                            "kv_resident_bytes": memory.kv_bytes if memory else None,
                        }
                        for instance, memory in zip(status.instances, memories, strict=True)
                    ],
                }
            )
            return
        console.out.print(console.server_line(status), markup=False)
        console.out.print(console.instances_table(status, memories))


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
            (one.name, one.pid) for one in status.instances if one.state == "ready" and one.pid
        ]
        verdict = prove(directory, ready, max_private, digests=digests)
        if as_json:
            print_json(verdict.model_dump())
        else:
            console.out.print(console.verdict_text(verdict))
            console.out.print(console.verdict_lines(verdict), markup=False)
    if not verdict.holds:
        raise typer.Exit(1)


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


def default_threads(num_instances: int) -> int:
    """Threads of one instance: the cores, shared out."""
    return max(1, len(os.sched_getaffinity(0)) // num_instances)


def _memories(
    status: ServerStatus, mapped: process_memory.HandedOut
) -> list[process_memory.ProcessMemory | None]:
    return [process_memory.read(one.pid, mapped) if one.pid else None for one in status.instances]


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
