"""What an instance of the served model is started as: settings and model in one message.

Owns nothing. Invariant: instances of one model as it is served all get the same weight set,
whatever lies at the model's path by then.
"""

import os
import time
from pathlib import Path

import msgspec

from allocator import RuntimeDir
from server.fleet.model_state import ModelState
from server.settings import Settings
from workers.client import Engines
from workers.messages import InstanceSpec


def spec_of(
    name: str, settings: Settings, model: ModelState, runtime_dir: RuntimeDir, engines: Engines
) -> InstanceSpec:
    """Of an instance of that name, as it is asked for now; the engines expect it to connect."""
    return InstanceSpec(
        name=name,
        runtime_dir=str(runtime_dir.path),
        engines=engines.expect(name),
        server_pid=os.getpid(),
        model=str(model.path),
        served_model_name=settings.served_model_name,
        requested_at=time.monotonic(),
        settings=settings.engine,
        num_threads=settings.num_threads,
        tokenizer=str(model.tokenizer),
        weight_set=model.weight_set or "",
        eos_token_ids=model.facts.eos_token_ids if model.facts is not None else None,
        hang_timeout_s=settings.hang_timeout_s,
    )


def of_other_files(spec: InstanceSpec, model: Path, tokenizer: Path) -> InstanceSpec:
    """The same for what lies there, whatever is served now."""
    return msgspec.structs.replace(
        spec, model=str(model), tokenizer=str(tokenizer), weight_set="", eos_token_ids=None
    )
