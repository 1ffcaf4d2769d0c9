"""Commands to ask before anything runs: plan, check, doctor."""

import sys
from typing import Annotated

import typer

from allocator import parse_bytes
from server import console
from server.cli.options import JsonOption, RuntimeDirOption, one_line_errors, print_json
from server.cli.setting_options import Options, engine_settings, takes_settings
from server.conformance.check import Checked
from server.conformance.check import check as compare
from server.console.checks import checks_line, checks_table
from server.console.conformance import (
    conformance_heading,
    conformance_lines,
    conformance_table,
)
from server.console.plan import plan_heading, plan_lines, plan_table, proposal_lines
from server.machine import checks
from server.machine.capacity import held_there, read_machine
from server.machine.doctor import clear_up, examine
from server.machine.proposal import propose
from server.machine.served_check import served_models
from server.models.source import find_model
from server.text.given import GivenText
from server.units import size_text
from workers import ReferenceName


@takes_settings(
    *("num_instances", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("num_speculative_tokens", "dtype", "weights", "kv_cache_dtype"),
    *("device_memory", "offload", "offload_depth"),
    *("tensor_parallel_size", "data_parallel_size"),
)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="`demo`, a Hugging Face folder, a .gguf file, or a hub id.", show_default=False
        ),
    ],
    options: Options,
    memory: Annotated[
        str | None,
        typer.Option(help="A device to plan for, as 24GB. Default: what is available here."),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="What the allocator may use, as 20GiB. Default: all of /dev/shm."),
    ] = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Say what MODEL will take, whether it fits, and where its layers should be, before anything is
    started.

    Reads the model's headers only. Weights and KV cache are exact; what is private to a process is
    an estimate. What an allocator that runs holds of the model counts as there for it. Exit status
    0 also where it does not fit: `--json` says so.
    """
    with one_line_errors():
        engine = engine_settings(options)
        source = find_model(model)
        held = held_there(runtime_dir, source.name, engine.device) if memory is None else None
        machine = read_machine(_size(memory), _size(memory_limit), held)
        with console.err.status(f"reading the headers of {source.name}"):
            proposal = propose(source, engine, options["num_instances"], machine)
        made = proposal.asked
        if as_json:
            print_json(
                {
                    **made.model_dump(mode="json"),
                    "placement": proposal.placement.model_dump(mode="json"),
                    "proposed": (
                        None if proposal.plan is made else proposal.plan.model_dump(mode="json")
                    ),
                }
            )
            return
        console.out.print(plan_heading(made), markup=False)
        console.out.print(plan_table(made))
        console.out.print(plan_lines(made), markup=False)
        console.out.print(proposal_lines(proposal), markup=False)


@takes_settings("chat_template", "pre_tokenizer")
def check(
    model: Annotated[
        str,
        typer.Argument(
            help="`demo`, a Hugging Face folder, a .gguf file, or a hub id.", show_default=False
        ),
    ],
    options: Options,
    against: Annotated[
        ReferenceName | None,
        typer.Option(
            help="What to compare with. Default: transformers for a folder, llama.cpp for a GGUF "
            "file.",
            show_default=False,
        ),
    ] = None,
    reference_python: Annotated[
        str | None,
        typer.Option(
            help="The Python interpreter of another environment, which has the reference.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="What to compute in: float32, bfloat16 or float16.")
    ] = "float32",
    tokens_only: Annotated[
        bool, typer.Option("--tokens-only", help="Generate nothing, so that no weights are read.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare what MODEL's texts, chats and prompts become here with what another library makes of
    them; exit 1 where something differs, or can't be compared.

    Needs no server, and disturbs none. Computes in private memory: first here, then there.
    """
    with one_line_errors():
        engine_settings({"dtype": dtype})
        checked = Checked(
            source=find_model(model),
            against=against,
            python=reference_python or sys.executable,
            given=GivenText(options["chat_template"], options["pre_tokenizer"]),
            dtype=dtype,
            computes=not tokens_only,
        )
        with console.err.status("") as status:
            found = compare(checked, status.update)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        console.out.print(conformance_heading(found), markup=False)
        console.out.print(conformance_table(found))
        console.out.print(conformance_lines(found), markup=False)
    if not found.same:
        raise typer.Exit(1)


def doctor(
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Remove shared memory that allocators which are gone have left, where it is "
            "proven that no process uses it.",
        ),
    ] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Check this machine, and say what to do where something is missing; exit 1 on a problem."""
    for run in clear_up() if fix else ():
        size = size_text(run.num_bytes)
        console.err.print(f"removed {len(run.segments)} segments, {size}: {run.run}-*")
    found = [*examine(runtime_dir), *served_models(runtime_dir)]
    status = checks.worst(found)
    if as_json:
        print_json({"status": status, "checks": [one.model_dump() for one in found]})
    else:
        console.out.print(checks_table(found))
        console.out.print(checks_line(found), markup=False)
    if status == "problem":
        raise typer.Exit(1)


def _size(text: str | None) -> int | None:
    return None if text is None else parse_bytes(text)
