"""Models are found by name, and by none where there is only one."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from allocator import RuntimeDir
from server.errors import UnknownModel
from server.models.files import ModelFiles
from server.models.in_flight import InFlight
from server.models.served import ServedModel
from server.models.table import Models
from server.settings import Settings
from server.text.loaded_text import KeptTokenizer
from tests.workers.tiny_models import write_checkpoint, write_tokenizer
from workers import EngineSettings


async def with_models(
    tmp_path: Path, names: list[str], test: Callable[[Models], Awaitable[None]]
) -> None:
    """Not launched: what they are called needs no instance."""
    runtime_dir = RuntimeDir.open(tmp_path / "run")
    tokenizers, models = [], []
    for name in names:
        folder = tmp_path / name
        write_checkpoint(folder, "llama")
        write_tokenizer(folder)
        tokenizers.append(KeptTokenizer.of(folder))
        settings = Settings(
            model=folder,
            served_model_name=name,
            runtime_dir=runtime_dir.path,
            engine=EngineSettings(threads=1),
        )
        models.append(
            ServedModel(settings, runtime_dir, ModelFiles.at(folder), tokenizers[-1], InFlight())
        )
    table = Models(models)
    try:
        await test(table)
    finally:
        await table.close()
        for tokenizer in tokenizers:
            tokenizer.close()


def test_one_needs_no_name(tmp_path: Path) -> None:
    async def test(models: Models) -> None:
        assert models.named(None) is models.named("one")
        assert [one.name for one in models] == ["one"]
        assert models.serving() == {}  # none of them is served yet
        assert (models.num_streams, models.draining, models.awaits_allocator) == (0, False, False)
        with pytest.raises(UnknownModel, match=r"'other' isn't served here. Served is 'one'"):
            models.named("other")

    asyncio.run(with_models(tmp_path, ["one"], test))


def test_of_several_one_must_be_named(tmp_path: Path) -> None:
    async def test(models: Models) -> None:
        one, two = models
        assert models.named("one") is one
        assert models.named("two") is two
        with pytest.raises(UnknownModel, match=r"Name one of the models .*: 'one', 'two'"):
            models.named(None)
        await models.drain(5.0)
        assert models.draining
        assert one.router.draining
        assert two.router.draining

    asyncio.run(with_models(tmp_path, ["one", "two"], test))
