"""Commands about memory: allocator, sleep, wake, pin, evict, and the view of `ps --memory`."""

import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from allocator import RuntimeDir, connect, module_command, module_environment
from server import console
from server.admin.weight_sets import sleep_model, wake_model, weight_set
from server.cli.memory_view import event_lines, memory_view
from server.cli.options import ModelArgument, RuntimeDirOption, one_line_errors, print_json


def allocator(
    device: Annotated[
        list[str] | None,
        typer.Option(help="host, cuda:N or cuda:GPU-UUID; can be given again. Default: host."),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="What to use at most of each device, as 800M or 20GiB. Default: all."),
    ] = None,
    host_tier_limit: Annotated[
        str | None, typer.Option(help="What may sleep in host memory. Default: all of /dev/shm.")
    ] = None,
    prefix_cache_limit: Annotated[
        str | None,
        typer.Option(
            help="What KV blocks that nobody maps may take. Default: what --memory-limit leaves; "
            "without one, an eighth of host memory."
        ),
    ] = None,
    image_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="ONECOPY_IMAGE_DIR",
            help="Where weight sets sleep on disk. Default: ~/.cache/onecopy/images.",
            show_default=False,
        ),
    ] = None,
    placement: Annotated[
        str,
        typer.Option(help="Of host memory: huge, interleave:0+1, bind:0, preferred:0; or several."),
    ] = "",
    quota: Annotated[
        list[str] | None,
        typer.Option(help="model:NAME=SIZE or user:NAME=SIZE; can be given again."),
    ] = None,
    runtime_dir: RuntimeDirOption = None,
) -> None:
    """Run the allocator alone, so that weights outlive the servers that use them."""
    given = {
        "--runtime-dir": runtime_dir,
        "--memory-limit": memory_limit,
        "--host-tier-limit": host_tier_limit,
        "--prefix-cache-limit": prefix_cache_limit,
        "--image-dir": image_dir,
        "--placement": placement,
    }
    arguments = [text for name, value in given.items() if value for text in (name, str(value))]
    arguments += [text for one in device or [] for text in ("--device", one)]
    arguments += [text for one in quota or [] for text in ("--quota", one)]
    command = module_command("allocator", *arguments)
    # Replace this process: the daemon needs none of what the command line has imported.
    os.execve(command[0], command, module_environment())  # noqa: S606


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
