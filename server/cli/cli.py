"""The command line: which commands there are, and what each one's help shows."""

from typing import Annotated, Final

import typer

from server import console
from server.cli import machine, memory, quantizing, serving
from server.version import version

_EXAMPLES: Final = """Begin with `onecopy serve demo`, and in a second terminal `onecopy ps`,
`onecopy verify`, `onecopy scale 4`, `onecopy stop`."""
_SERVE_EXAMPLES: Final = """Examples: `onecopy serve demo`; `onecopy serve ./Qwen3-0.6B
--instances 4 --max-model-len 4096`; `onecopy serve model.gguf --uds /run/llm.sock`."""
_PLAN_EXAMPLES: Final = """Examples: `onecopy plan demo`; `onecopy plan ./Qwen3-0.6B --instances 8
--max-model-len 4096`; `onecopy plan model.gguf --memory 16GB --json`."""
_CHECK_EXAMPLES: Final = """Examples: `onecopy check ./Qwen3-0.6B`; `onecopy check model.gguf
--reference-python ~/llamacpp/bin/python`; `onecopy check ./big --tokens-only --json`."""
_QUANTIZE_EXAMPLES: Final = """Examples: `onecopy quantize ./Qwen3-0.6B ./small --scheme w4a16`;
`onecopy quantize Qwen/Qwen3-0.6B ./small --scheme w8a8`; `onecopy quantize ./Qwen3-0.6B ./small
--scheme w4a16 --group-size 32 --keep down_proj`."""

app = typer.Typer(
    name="onecopy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.out.print(f"onecopy {version()}")
        raise typer.Exit


@app.callback(epilog=_EXAMPLES)
def _common(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """One copy of the weights on each device, however many instances serve it."""


app.command(epilog=_SERVE_EXAMPLES)(serving.serve)
app.command()(memory.allocator)
app.command()(serving.ps)
app.command()(serving.scale)
app.command()(serving.reload)
app.command()(serving.verify)
app.command()(memory.sleep)
app.command()(memory.wake)
app.command()(memory.pin)
app.command()(memory.evict)
app.command(epilog=_PLAN_EXAMPLES)(machine.plan)
app.command(epilog=_CHECK_EXAMPLES)(machine.check)
app.command(epilog=_QUANTIZE_EXAMPLES)(quantizing.quantize)
app.command()(quantizing.convert)
app.command("eval")(quantizing.evaluate)
app.command()(machine.doctor)
app.command()(serving.stop)


def main() -> None:
    """The `onecopy` command."""
    app()
