"""All that a server can be told, validated once, before anything starts.

Knows nothing of where the values come from (command line, environment).
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.cache_salt import SaltedBy
from server.generation import NO_ADVICE, SamplingDefaults

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
KernelsName = Literal["auto", "amx", "avx512_bf16", "avx512", "avx2", "portable"]


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
    runtime_dir: Path
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    uds: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    """By which names it may be called, beside those that are its own."""
    num_instances: int = Field(default=2, ge=1, le=256)
    dtype: DtypeName = "auto"
    sampling_defaults: SamplingDefaults = NO_ADVICE
    max_model_len: int | None = Field(default=None, ge=2)
    max_num_seqs: int = Field(default=16, ge=1, le=4096)
    token_budget: int = Field(default=384, ge=1, le=1 << 20)
    """Prompt tokens that one step computes: more take in prompts faster, fewer hold up running
    streams less."""
    attention_workspace: int = Field(default=256 << 20, ge=1 << 20)
    """What attention may take for itself in a step, in bytes."""
    num_speculative_tokens: int = Field(default=0, ge=0, le=16)
    """The longest guess at a sequence's next tokens, looked up in what it has said; 0 for none."""
    cpu_kernels: KernelsName = "auto"
    """The instruction set of the kernels that compute on the processor."""
    prefix_caching: bool = True
    """Whether instances find what any of them has computed of a common beginning."""
    prefix_cache_salt: SaltedBy = "none"
    """Which requests share it."""
    num_threads: int = Field(default=1, ge=1, le=1024)
    shares_cores: bool = False
    """Whether the instances that compute share all cores, rather than keep to `num_threads`."""
    max_queued: int = Field(default=256, ge=1)
    """Requests beyond those that run; one more is refused with 503."""
    drain_timeout_s: float = Field(default=30.0, gt=0)
    hang_timeout_s: float = Field(default=3.0, ge=0)
    """How long a process may be stopped, as by SIGSTOP, before it is replaced; 0: for ever, and one
    that hangs in another way, too."""
    device: str = "host"
    """What the weights are on, as `onecopy allocator --device` names it."""
    map_files: bool = False
    """Whether checkpoint files that need no conversion are mapped instead of copied."""
    memory_limit: int | None = Field(default=None, ge=1)
    """Of the allocator, in bytes, where this server has to start one."""
