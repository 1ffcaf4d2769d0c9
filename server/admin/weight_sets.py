"""Weight sets by the names that people use: putting them to sleep, waking them; by the server that
serves one of them, else by the allocator.

Owns how a person names a weight set. Invariant: a name that fits several sets is refused, with all
of them listed.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from allocator import Client, RuntimeDir, Statistics, connect
from server.admin.client import AdminClient, NoServer
from server.admin.schemas import ModelStatus


class NoSuchModel(Exception):
    """No weight set, or more than one, goes by that name. The message lists what there is."""


def sleep_model(runtime_dir: RuntimeDir, model: str | None, level: int) -> str:
    """Put a model to sleep: by its server where one serves it, else its idle weight set. Returns
    what to tell. Raises NoSuchModel, AdminError, AllocatorError."""
    served = _served(runtime_dir, model)
    if served is not None:
        name = served.model
        told = AdminClient(runtime_dir).sleep(level, name).named(name)
        weights = told.weight_set if told is not None else None
    else:
        with connect(runtime_dir, label="onecopy sleep") as memory:
            name = weights = weight_set_key(memory.statistics(), model)
            memory.sleep(name, level=level)
    with connect(runtime_dir, label="onecopy sleep") as memory:
        tiers = {one.key: one.tier for one in memory.statistics().weight_sets}
    # One that has an image already goes there at any level, and a mapped file stays where it is.
    where = "in host memory" if tiers.get(weights or "") == "host" else "on disk"
    return f"{name} sleeps; its weights are {where}"


def wake_model(runtime_dir: RuntimeDir, model: str | None) -> str:
    """The reverse. Returns what to tell. Raises as `sleep_model` does."""
    served = _served(runtime_dir, model)
    if served is not None:
        told = AdminClient(runtime_dir).sleep(0, served.model).named(served.model)
        return f"{served.model} is awake: {len(told.instances) if told else 0} instances"
    with connect(runtime_dir, label="onecopy wake") as memory:
        key = weight_set_key(memory.statistics(), model)
        memory.wake(key)
    return f"{key} is awake, and idle: nobody maps it yet"


@contextlib.contextmanager
def weight_set(runtime_dir: RuntimeDir, model: str) -> Iterator[tuple[Client, str]]:
    """A session, and the key that the name means. Raises NoSuchModel, AllocatorError."""
    with connect(runtime_dir, label="onecopy") as memory:
        yield memory, weight_set_key(memory.statistics(), model)


def weight_set_key(statistics: Statistics, name: str | None) -> str:
    """The one weight set that a person means by `name`: its key, the key's part before "@", the
    model that it was loaded for, or the start of one of them; None where there is only one set.

    Raises NoSuchModel.
    """
    keys = {one.key: one.model for one in statistics.weight_sets}
    if not keys:
        raise NoSuchModel("the allocator holds no weight set: load one with `onecopy serve`")
    if name is None:
        found = list(keys)
    else:
        wanted = Path(name).name if "/" in name else name
        found = [
            key
            for key, model in keys.items()
            if wanted in (key, model, key.rpartition("@")[0], Path(key.rpartition("@")[0]).stem)
        ] or [key for key, model in keys.items() if key.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NoSuchModel(f"no weight set is called {name!r}; there are: {_listed(keys)}")
    raise NoSuchModel(f"name one of these weight sets: {_listed(found)}")


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys))


def _served(runtime_dir: RuntimeDir, model: str | None) -> ModelStatus | None:
    """The model of a running server that a person means; None where it serves none of that name."""
    try:
        return AdminClient(runtime_dir).status().named(model)
    except NoServer:
        return None  # one that does not answer is no reason to act without it
