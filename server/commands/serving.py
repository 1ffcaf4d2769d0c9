"""Commands about a server and its instances: serve, scale, ps, verify, stop."""

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Annotated, Final

import typer

from allocator import RuntimeDir, check_limits, connect, parse_bytes
from allocator.messages import WeightSetStatistics
from server import console, process_memory
from server.admin import ADMIN_PATHS, AdminClient, NoServer, ServerStatus
from server.commands.memory import show_memory
from server.commands.options import (
    JsonOption,
    RuntimeDirOption,
    fail,
    one_line_errors,
    print_json,
)
from server.daemons import stop_process
from server.model_source import find_model
from server.serve import serve as run_server
from server.settings import Settings
from server.verify import MAX_PRIVATE_BYTES, judge_all

_LOG_FORMAT: Final = "%(asctime)s %(name)s: %(message)s"
_STOP_TIMEOUT_S: Final = 30.0
"""What a process may take to end, beyond what it grants its running requests."""


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
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longest prompt and answer together, in tokens. Default: the model's own."
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Sequences that run at once in one instance.")
    ] = 16,
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
            served_model_name=served_model_name or source.name,
            runtime_dir=RuntimeDir.open(runtime_dir).path,
            host=host,
            port=port,
            uds=uds.absolute() if uds else None,
            num_instances=instances,
            sampling_defaults=source.sampling,
            dtype=dtype,  # type: ignore[arg-type]  # pydantic checks it
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            token_budget=max_num_batched_tokens,
            attention_workspace=parse_bytes(attention_workspace),
            num_speculative_tokens=num_speculative_tokens,
            prefix_caching=prefix_caching,
            num_threads=threads or default_threads(instances),
            shares_cores=threads is None,
            drain_timeout_s=drain_timeout,
            memory_limit=None if memory_limit is None else parse_bytes(memory_limit),
            device=device,
            map_files=map_files,
        )
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
        status = AdminClient(RuntimeDir.open(runtime_dir, create=False)).status()
        memories = _memories(status)
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


def verify(
    max_private: Annotated[
        int, typer.Option(min=1, help="Private bytes an instance may have, KV cache aside.")
    ] = MAX_PRIVATE_BYTES,
    digests: Annotated[
        bool, typer.Option("--digests", help="Also check every tensor's bytes; reads all of them.")
    ] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Prove from the kernel's figures that all instances map one copy; exit 1 where they do not."""
    with one_line_errors():
        directory = RuntimeDir.open(runtime_dir, create=False)
        status = AdminClient(directory).status()
        ready = [one for one in status.instances if one.state == "ready" and one.pid is not None]
        with connect(directory) as memory:
            weight_sets = memory.statistics().weight_sets
        pids = {one.pid for one in ready}
        used = [one for one in weight_sets if pids & set(one.reader_pids)]
        if not used:
            fail(
                "the allocator knows of no weight set that a ready instance reads. Either none is "
                "ready (`onecopy ps`), or the allocator was restarted after they attached: then "
                "`onecopy stop` and start again, to hold one copy"
            )
        memories = [(one.name, process_memory.read(one.pid or 0)) for one in ready]
        verdict = judge_all(_segments(used[0]), memories, max_private)
        if len(used) > 1:
            verdict.holds = False
            verdict.problems.append(f"the instances read {len(used)} weight sets, not one")
        if digests:
            with connect(directory, label="onecopy verify") as memory:
                damaged = memory.damaged(used[0].key)
            if damaged:
                verdict.holds = False
                verdict.problems.append(
                    f"{len(damaged)} tensors are not what was sealed, {damaged[0]} first"
                )
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
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Stop the server, after its running requests, and then the allocator."""
    with one_line_errors():
        directory = RuntimeDir.open(runtime_dir, create=False)
        stopped = []
        for role in ("server",) if keep_allocator else ("server", "allocator"):
            owner = directory.owner(role)
            if owner is None:
                continue
            timeout_s = _STOP_TIMEOUT_S
            if role == "server":
                if keep_allocator:
                    AdminClient(directory).keep_allocator()
                with contextlib.suppress(NoServer):  # one that is about to start, or to end
                    timeout_s += AdminClient(directory).status().drain_timeout_s
                console.err.print(f"stopping the server (pid {owner.pid}) after its requests")
            gently = stop_process(owner.process, timeout_s)
            stopped.append(f"{role} (pid {owner.pid}{'' if gently else ', killed'})")
        if not stopped:
            console.out.print(f"nothing runs in {directory.path}")
            return
        console.out.print(f"stopped {' and '.join(stopped)}", markup=False)


def default_threads(num_instances: int) -> int:
    """Threads of one instance: the cores, shared out."""
    return max(1, len(os.sched_getaffinity(0)) // num_instances)


def _memories(status: ServerStatus) -> list[process_memory.ProcessMemory | None]:
    return [process_memory.read(one.pid) if one.pid else None for one in status.instances]


def _segments(weight_set: WeightSetStatistics) -> dict[str, int]:
    """Segment or file → bytes."""
    in_files = sum(num_bytes for _, num_bytes in weight_set.files)
    return {weight_set.segment: weight_set.num_bytes - in_files, **dict(weight_set.files)}


def _log_to_stderr() -> None:
    handler = console.ConsoleHandler()
    handler.setFormatter(logging.Formatter(_LOG_FORMAT, datefmt="%H:%M:%S"))
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
