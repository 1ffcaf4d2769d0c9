"""All that a server can be told, validated once, before anything starts.

What has a description can be set by a person: the command line makes its options of these fields,
and of those of the engine's settings. Knows nothing of where the values come from.
"""

import os
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, field_validator

from server.cache_salt import SaltedBy
from server.generation import NO_ADVICE, SamplingDefaults
from server.placement import Placement
from server.text.given import GivenText
from workers import EngineSettings

PlacementName = Literal["given", "auto"]
MAX_INSTANCES: Final = 256


class Settings(BaseModel):
    """One server. Lengths are in tokens, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        """Names and paths travel as text."""
        if isinstance(value, str | Path):
            try:
                str(value).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{os.fsencode(value)!r} is no UTF-8") from error
        return value

    model: Path
    served_model_name: str
    model_named: str = ""
    """As a person named it: what `onecopy reload` looks for again."""
    model_given: Path | None = None
    """As a person gave it, if as a path, with the links that led to `model`."""
    chat_template: Path | None = Field(
        default=None,
        description="A file with the chat template to use in place of the model's own, in Jinja.",
    )
    pre_tokenizer: str | None = Field(
        default=None,
        description="How a GGUF file's text is cut into words, by a name of llama.cpp's such as "
        "llama-bpe or qwen2, in place of what the file says, or does not say.",
    )
    sampling_defaults: SamplingDefaults = NO_ADVICE
    runtime_dir: Path
    num_instances: int = Field(
        default=2,
        ge=1,
        le=MAX_INSTANCES,
        description="Engines to run; they share one copy of the weights.",
    )
    host: str = Field(default="127.0.0.1", description="Address to serve on.")
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port to serve on; 0 picks a free one."
    )
    uds: Path | None = Field(
        default=None, description="Serve on this Unix socket instead of host and port."
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="A name by which clients may call the server, as `api.example.com`, "
        "`*.example.com` or `*`; can be given several times. Addresses, localhost and the "
        "machine's own name need not be named.",
    )
    max_queued: int = Field(
        default=256,
        ge=1,
        description="Requests that may wait beyond those that run; one more is refused (503).",
    )
    prefix_cache_salt: SaltedBy = Field(
        default="none",
        description="Who finds what was computed: none (all find all), key (requests of the same "
        "API key), random (requests of this start of the server).",
    )
    memory_limit: int | None = Field(
        default=None,
        ge=1,
        description="What the allocator may use, as 800M or 20GiB, where this starts one.",
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0.1, description="Seconds that running requests get at the end."
    )
    hang_timeout_s: float = Field(
        default=3.0,
        ge=0,
        description="Seconds for which an instance may be stopped before another takes its place; "
        "0: for ever, as for a debugger.",
    )
    placement: PlacementName = Field(
        default="given",
        description="Where the model's layers are: given, as the other options say; auto, as "
        "`onecopy plan` proposes for what this machine has.",
    )
    chosen: Placement | None = None
    """Where it was chosen."""
    engine: InstanceOf[EngineSettings] = EngineSettings()
    """Of each instance."""

    @property
    def given_text(self) -> GivenText:
        """What goes before the model's own files."""
        return GivenText(self.chat_template, self.pre_tokenizer)

    @property
    def num_threads(self) -> int:
        """Of an instance: as many as it was told to have, else its part of the cores."""
        part = len(os.sched_getaffinity(0)) // self.num_instances
        return self.engine.threads or max(1, part)
