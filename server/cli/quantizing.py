"""The commands about other forms of a checkpoint: quantize, convert, eval."""

from pathlib import Path
from typing import Annotated

import typer

from allocator import parse_bytes
from server import console
from server.cli.options import JsonOption, fail, one_line_errors, print_json
from server.cli.setting_options import engine_settings
from server.conformance.evaluate import OWN_TEXT
from server.conformance.evaluate import evaluate as evaluate_models
from server.console.evaluation import evaluation_heading, evaluation_table
from server.console.quantize import QuantizeDisplay, made_document, made_table
from server.models.source import find_model
from server.text.tokenizer_files import tokenizer_folder
from workers import SCHEMES, QuantizeChoices, QuantizeRequest, quantize_checkpoint


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            help="`demo`, a Hugging Face folder, a .gguf file, or a hub id.",
            metavar="SRC",
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            help="The folder to be made; nothing may be there.", metavar="DST", show_default=False
        ),
    ],
    scheme: Annotated[
        str,
        typer.Option(help=f"How weights are rounded: {', '.join(SCHEMES)}.", show_default=False),
    ],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale: 32, 64 or 128. Default: with 4 bits the largest that "
            "divides all rows, with 8 a scale for each row.",
            show_default=False,
        ),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="A zero point for each scale, too.")
    ] = False,
    clip_search: Annotated[
        bool,
        typer.Option(
            "--clip-search",
            help="Of 20 ranges take the one that loses the least, squared: many times slower.",
        ),
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="A regular expression: tensors whose names it is found in stay as they are. "
            "Several times, if need be.",
            show_default=False,
        ),
    ] = None,
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="Round the output head, where it is stored, too.")
    ] = False,
    chunk_size: Annotated[
        str, typer.Option(help="Of SRC, what is held at the same time: memory is a few of it.")
    ] = "8MiB",
    as_json: JsonOption = False,
) -> None:
    """Round the linears of SRC to 8 or 4 bits, and write them as DST, in the layout of
    compressed-tensors, which transformers and vLLM read.

    Memory depends on --chunk-size alone. DST appears when it is complete and was read back; what
    ended before goes on with the same command.
    """
    with one_line_errors():
        found = find_model(source)
        request = QuantizeRequest(
            source=found.path,
            tokenizer=tokenizer_folder(found.path) if found.path.is_file() else None,
            destination=destination,
            scheme=scheme,
            group_size=group_size,
            symmetric=not asymmetric,
            searches_clip=clip_search,
            choices=QuantizeChoices(tuple(keep or ()), lm_head),
            chunk_bytes=parse_bytes(chunk_size),
        )
        with QuantizeDisplay(found.name) as display:
            made = quantize_checkpoint(request, display.show)
        if as_json:
            print_json(made_document(made, display.peak_bytes))
            return
        console.out.print(made_table(made))
        console.out.print(display.summary(made), markup=False)


def convert(
    source: Annotated[
        str, typer.Argument(help="`demo`, or a .gguf file.", metavar="SRC", show_default=False)
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            help="The folder to be made; nothing may be there.", metavar="DST", show_default=False
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Write a GGUF file as a Hugging Face folder: bfloat16, config, tokenizer and templates.

    In memory that does not depend on the model. DST appears when it is complete; what ended before
    goes on with the same command.
    """
    with one_line_errors():
        found = find_model(source)
        if found.path.is_dir():
            fail(f"{found.path} is a Hugging Face folder already; GGUF files are not written")
        request = QuantizeRequest(
            source=found.path,
            destination=destination,
            scheme=None,
            tokenizer=tokenizer_folder(found.path),
        )
        with QuantizeDisplay(found.name) as display:
            made = quantize_checkpoint(request, display.show)
        if as_json:
            print_json(made_document(made, display.peak_bytes))
            return
        console.out.print(display.summary(made).lstrip(), markup=False)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="`demo`, folders, .gguf files, or hub ids.", show_default=False),
    ],
    against: Annotated[
        str | None,
        typer.Option(help="The model that they were made of.", show_default=False),
    ] = None,
    text: Annotated[
        Path,
        typer.Option(help="A file of text; a short one comes along.", show_default=False),
    ] = OWN_TEXT,
    window: Annotated[
        int, typer.Option(min=8, max=1 << 20, help="Tokens that are predicted behind each other.")
    ] = 512,
    dtype: Annotated[
        str, typer.Option(help="What to compute in: auto, float32, bfloat16 or float16.")
    ] = "auto",
    weights: Annotated[
        str,
        typer.Option(help="Of MODELS: packed, expanded to bf16, or auto, as they are served."),
    ] = "auto",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Of MODELS: auto, bf16, int8 or int4, as they are served.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say how well MODELS predict a text: perplexity and, beside another model, how far they are
    from what it predicts.

    Needs no server, and disturbs none. The weights of one model and of the other are in private
    memory meanwhile.
    """
    with one_line_errors():
        kept = {"dtype": dtype, "weights": weights, "kv_cache_dtype": kv_cache_dtype}
        engine_settings(kept)
        sources = [find_model(model) for model in models]
        reference = None if against is None else find_model(against)
        with console.err.status("") as status:
            found = evaluate_models(sources, reference, text, window, **kept, tell=status.update)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    console.out.print(evaluation_heading(found), markup=False)
    console.out.print(evaluation_table(found))
