"""Commands about memory: allocator, sleep, wake, pin, evict, and the view of `ps --memory`."""

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Annotated

import msgspec
import typer

from allocator import OPTIONS as ALLOCATOR_OPTIONS
from allocator import (
    RuntimeDir,
    connect,
    module_command,
    module_environment,
    option_arguments,
)
from server import console
from server.admin.weight_sets import sleep_model, wake_model, weight_set
from server.cli.memory_view import event_lines, memory_view
from server.cli.options import ModelArgument, RuntimeDirOption, one_line_errors, print_json


def allocator(runtime_dir: RuntimeDirOption = None, **given: object) -> None:
    """Run the allocator alone, so that weights outlive the servers that use them."""
    arguments = option_arguments(given)
    if runtime_dir is not None:
        arguments += ["--runtime-dir", str(runtime_dir)]
    command = module_command("allocator", *arguments)
    # Replace this process: the daemon needs none of what the command line has imported.
    os.execve(command[0], command, module_environment())  # noqa: S606


def _options_of_the_daemon() -> Iterator[inspect.Parameter]:
    """Each as typer declares one."""
    for option in ALLOCATOR_OPTIONS:
        shown = typer.Option(
            option.name,
            help=option.help,
            envvar="ONECOPY_IMAGE_DIR" if option.field == "image_dir" else None,
            show_default=False,
        )
        kind: object = list[str] | None if option.repeats else str | None
        declared: object = Annotated[kind, shown]
        keyword = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(option.field, keyword, default=None, annotation=declared)


def _with_options_of_the_daemon(command: Callable[..., None]) -> None:
    own = [one for one in inspect.signature(command).parameters.values() if one.name != "given"]
    signature = inspect.Signature([*own, *_options_of_the_daemon()])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}


_with_options_of_the_daemon(allocator)


def sleep(
    model: ModelArgument = None,
    level: Annotated[
        int, typer.Option(min=1, max=2, help="1: weights to host memory; 2: to an image on disk.")
    ] = 1,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Put a model to sleep: its instances end after their requests, its device memory is freed."""
    with one_line_errors():
        directory = RuntimeDir.open(runtime_dir, create=False)
        with console.err.status("going to sleep"):
            told = sleep_model(directory, model, level)
        console.out.print(told, markup=False)


def wake(model: ModelArgument = None, runtime_dir: RuntimeDirOption = None) -> None:
    """Wake a sleeping model: its weights come back to the device, its instances start."""
    with one_line_errors():
        directory = RuntimeDir.open(runtime_dir, create=False)
        with console.err.status("waking up"):
            told = wake_model(directory, model)
        console.out.print(told, markup=False)


def pin(
    model: Annotated[str, typer.Argument(help="A weight set, as `onecopy ps --memory` names it.")],
    off: Annotated[bool, typer.Option("--off", help="Take the pin away.")] = False,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Keep a model's weights on the device, also while nobody uses them and others want room."""
    with one_line_errors():
        directory = RuntimeDir.open(runtime_dir, create=False)
        with weight_set(directory, model) as (memory, key):
            memory.pin(key, not off)
        console.out.print(f"{key} is {'not pinned' if off else 'pinned'}", markup=False)


def evict(
    model: Annotated[str, typer.Argument(help="A weight set, as `onecopy ps --memory` names it.")],
    image: Annotated[bool, typer.Option("--image", help="Delete its image on disk, too.")] = False,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Free the memory of a weight set that nobody uses."""
    with one_line_errors():
        directory = RuntimeDir.open(runtime_dir, create=False)
        with weight_set(directory, model) as (memory, key):
            memory.evict(key, image=image)
        console.out.print(f"{key} is evicted", markup=False)


def show_memory(directory: RuntimeDir, num_events: int, as_json: bool) -> None:
    with connect(directory, label="onecopy ps") as memory:
        devices = memory.devices
        events = memory.events()[-num_events:] if num_events else ()
    pictures = []
    for device in devices:
        with connect(directory, device=device, label="onecopy ps") as memory:
            pictures.append((memory.statistics(), memory.regions()))
    if as_json:
        print_json(
            {
                "devices": [
                    {**msgspec.to_builtins(one), "regions": msgspec.to_builtins(regions)["regions"]}
                    for one, regions in pictures
                ],
                "events": msgspec.to_builtins(events),
            }
        )
        return
    for statistics, regions in pictures:
        console.out.print(memory_view(statistics, regions))
    if events:
        console.out.print()
        console.out.print(event_lines(events))
