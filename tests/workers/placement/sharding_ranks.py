"""Ranks that shard series among them: real processes, each asked line by line.

Owns the processes, the models that they compute, and transports that deliver as late or as early as
they may. Invariant: a rank compares what it computes sharded with what it computes unsharded, bit
for bit, on windows that were filled with NaN before.
"""

import contextlib
import gc
import json
import random
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from allocator import Client, WeightSetReader, connect
from tests.leaks import Leaks, wait_until
from workers.checkpoint import open_checkpoint
from workers.errors import WorkerError
from workers.placement.group import Ranks
from workers.placement.sharded import ShardedSeries, shard_series
from workers.placement.transport import Arrival, Channel, Fill, Transport
from workers.placement.transport_gloo import GlooTransport
from workers.placement.transport_shm import ShmTransport

ROOT = Path(__file__).parents[3]
WIDTH = 16
DEADLINE_S = 120.0
"""Of a pass in which all do what they should."""
_FORGOTTEN = (
    "ShardedSeries",
    "Series",
    "CollectiveChannel",
    "ShmChannel",
    "Group",
    "ProcessGroupGloo",
)


class Quantized(nn.Module):
    """A linear of integers, with scales and zero points, one tensor of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 128, (WIDTH, WIDTH)).to(torch.int8).T)
        self.register_buffer("zero_point", torch.randint(0, 255, (WIDTH,)).to(torch.uint8))
        self.scale = nn.Parameter(torch.rand(WIDTH) / 500, requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight.float() - self.zero_point.float()) * self.scale
        return x @ weight


class Layer(nn.Module):
    def __init__(self, has_linears: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.Module()
        if has_linears:
            self.attention.o_proj = nn.Linear(WIDTH, WIDTH)
            self.attention.q_b_proj = Quantized()
        self.failure: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        if hasattr(self.attention, "o_proj"):
            x = x + self.attention.q_b_proj(x)
            if self.failure is not None:
                raise RuntimeError(self.failure)
            x = x + torch.tanh(self.attention.o_proj(x))
        return x


class Stack(nn.Module):
    """`start` layers without linears, then `num_linears` with."""

    def __init__(self, start: int, num_linears: int) -> None:
        super().__init__()
        torch.manual_seed(1000 * start + num_linears)
        self.layers = nn.ModuleList(Layer(i >= start) for i in range(start + num_linears))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def inputs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(3, WIDTH, generator=generator) for _ in range(count)]


class Delivering:
    """A transport whose broadcasts arrive `how`: "early", all of them before anything else is done;
    "late", only when somebody waits; "sometime", after a random while. Without `waits`, nobody
    waits for them."""

    def __init__(self, transport: Transport, how: str, waits: bool) -> None:
        self._transport = transport
        self.how = how
        self.waits = waits
        self.rank = transport.rank
        self.num_ranks = transport.num_ranks

    def open(self, series: str) -> Channel:
        return DeliveringChannel(self._transport.open(series), self)


class DeliveringChannel:
    def __init__(self, channel: Channel, transport: Delivering) -> None:
        self._channel = channel
        self._transport = transport
        self._random = random.Random(transport.rank)
        self._threads: list[threading.Thread] = []
        self.device = channel.device
        self.maps_all = channel.maps_all

    def place(self, num_bytes: int, own: Mapping[int, Fill]) -> None:
        self._channel.place(num_bytes, own)

    def join(self, form: str) -> None:
        self._channel.join(form)

    def extent(self, index: int) -> torch.Tensor | None:
        return self._channel.extent(index)

    def window(self, num_bytes: int) -> torch.Tensor:
        return self._channel.window(num_bytes)

    def used(self, extent: torch.Tensor) -> None:
        extent.fill_(255)  # nobody relies on it any more
        self._channel.used(extent)

    def broadcast(self, extent: torch.Tensor, owner: int) -> Arrival:
        scratch = extent if owner == self._transport.rank else torch.empty_like(extent)
        arrival = self._channel.broadcast(scratch, owner)

        def deliver() -> None:
            arrival.wait()
            if scratch is not extent:
                extent.copy_(scratch)

        if self._transport.how == "early":
            deliver()
            return _Arrival(lambda: None)
        if self._transport.how == "late":
            return _Arrival(deliver if self._transport.waits else arrival.wait)
        timer = threading.Timer(self._random.uniform(0.001, 0.003), deliver)
        timer.start()
        self._threads.append(timer)
        return _Arrival(timer.join if self._transport.waits else lambda: None)

    def leave(self) -> None:
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._channel.leave()

    def close(self) -> None:
        self.leave()
        self._channel.close()


@dataclass(frozen=True)
class _Arrival:
    wait: Any


def private_bytes() -> int:
    """Of all storages that tensors of this process lie in, but for memory that processes share."""
    gc.collect()
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if isinstance(one, torch.Tensor) and not one.is_meta
    }
    shared = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/dev/shm/" in line
    ]
    return sum(n for at, n in storages.items() if not any(at in one for one in shared))


def bytes_of(module: nn.Module, name: str) -> int:
    linear = next(one for path, one in module.named_modules() if path.endswith(name))
    return sum(tensor.nbytes for tensor in (*linear.parameters(), *linear.buffers()))


class Rank:
    """What one process can be asked for. Answers are JSON. `place`: kind of transport, store, rank,
    num_ranks, join_timeout_s, and where the allocator runs."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()  # what has been imported need not be looked through again and again
        self._ends = ExitStack()
        self._before = self._now()
        self._leaks = Leaks(timeout_s=DEADLINE_S)
        self._sharded: ShardedSeries | None = None
        self._model = nn.Module()
        self._wanted: list[torch.Tensor] = []

    def sweep(
        self, place: dict[str, Any], name: str, cases: list[list[int]], num_passes: int = 2
    ) -> list[str]:
        """Passes of each (num_linears, start, ahead). Returns what is wrong."""
        wrong: list[str] = []
        with ExitStack() as ends:
            transport, memory, _ = _transport(place, ends)
            for num_linears, start, ahead in cases:
                case = f"L={num_linears} start={start} k={ahead}"
                begun = private_bytes()
                model, xs = Stack(start, num_linears), inputs(num_passes)
                wanted = [model(x) for x in xs]
                one = bytes_of(model, name)
                others = private_bytes() - begun - num_linears * one
                with shard_series(model, [name], transport, ahead=ahead) as sharded:
                    taken = private_bytes() - begun - others
                    if memory is not None:
                        taken += _set_bytes(memory, place["rank"])
                    share = -(-num_linears // place["num_ranks"])
                    if taken > (share + ahead + 1) * one + 1:  # the fence
                        wrong.append(f"{case}: {taken} bytes, {one} each")
                    if not sharded.num_bytes <= taken <= sharded.num_bytes + 1:
                        wrong.append(f"{case}: {taken} bytes instead of {sharded.num_bytes}")
                    _poison(sharded)
                    for number, (x, result) in enumerate(zip(xs, wanted, strict=True)):
                        if not torch.equal(model(x), result):
                            wrong.append(f"{case}: another result of pass {number}")
                del model, wanted, sharded
        return wrong

    def open(
        self,
        place: dict[str, Any],
        names: list[str],
        num_linears: int,
        ahead: int,
        how: str = "",
        waits: bool = True,
    ) -> str:
        """Shard a model of so many layers."""
        self._model = Stack(0, num_linears)
        self._wanted = [self._model(x) for x in inputs(4)]
        transport, _, self._ranks = _transport(place, self._ends)
        if how:
            transport = Delivering(transport, how, waits)
        try:
            sharded = shard_series(self._model, names, transport, ahead=ahead)
        except WorkerError as error:
            return f"{type(error).__name__}: {error}"
        self._sharded = self._ends.enter_context(sharded)
        _poison(sharded)
        return "open"

    def read(self, place: dict[str, Any], path: str, own_path: str, ahead: int) -> dict[str, Any]:
        """Shard the model of a checkpoint whose own linears are read from that at `own_path`.
        Returns whether it computes what it does with everything that is at `path`, and how many
        bytes were read for it."""
        from transformers import AutoModelForCausalLM  # seconds, which the others need not wait for

        full = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        tokens = torch.arange(10)[None]
        wanted = full(tokens).logits
        self._before["threads"] = self._now()["threads"]  # what loading it has started, stays
        for name, parameter in list(full.named_parameters()):
            if name.endswith("o_proj.weight"):
                owner = full.get_submodule(name.removesuffix(".weight"))
                owner.weight = nn.Parameter(parameter.to("meta"), requires_grad=False)
        checkpoint = open_checkpoint(own_path)
        checkpoint.tensors()
        with ExitStack() as ends, torch.inference_mode():
            transport, _, _ = _transport(place, ends)
            begun = _bytes_read()
            with shard_series(
                full, ["o_proj"], transport, ahead=ahead, checkpoint=checkpoint
            ) as sharded:
                read = _bytes_read() - begun
                _poison(sharded)
                equal = all(torch.equal(full(tokens).logits, wanted) for _ in range(2))
                return {"equal": equal, "read": read}

    def run(self, number: int, fail_in: int | None = None, timeout_s: float | None = None) -> str:
        """A pass on input `number`, in which layer `fail_in` fails, with a deadline of its own.
        Returns "equal", "different" or the error's name."""
        if timeout_s is not None:
            object.__setattr__(self._ranks, "timeout_s", timeout_s)
        if fail_in is not None:
            self._model.layers[fail_in].failure = "as it was told"
        try:
            result = self._model(inputs(4)[number])
        except Exception as error:  # noqa: BLE001 - this is what is looked at
            return type(error).__name__
        finally:
            object.__setattr__(self._ranks, "timeout_s", DEADLINE_S)
            for layer in self._model.layers:
                layer.failure = None
        return "equal" if torch.equal(result, self._wanted[number]) else "different"

    def rebuild(self) -> str:
        """Make all groups anew."""
        assert self._sharded is not None
        self._sharded.rebuild()
        return "rebuilt"

    def close(self) -> dict[str, int]:
        """Unload. Returns how much there is more than at first, when nothing goes any more."""
        self._ends.close()
        self._sharded, self._model = None, nn.Module()
        self._wanted.clear()
        self._leaks.check()
        gc.collect()
        wait_until(
            lambda: self._now()["threads"] <= self._before["threads"], "threads end", DEADLINE_S
        )
        now = self._now()
        return {name: now[name] - self._before[name] for name in now}

    @staticmethod
    def _now() -> dict[str, int]:
        return {
            "threads": sum(1 for _ in Path("/proc/self/task").iterdir()),
            "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
            "series": sum(type(one).__name__ in _FORGOTTEN for one in gc.get_objects()),
        }


def _transport(place: dict[str, Any], ends: ExitStack) -> tuple[Transport, Client | None, Ranks]:
    store = dist.FileStore(place["store"], -1)
    ranks = Ranks(store, place["rank"], place["num_ranks"], DEADLINE_S, place["join_timeout_s"])
    if place["kind"] == "gloo":
        return GlooTransport(ranks), None, ranks
    memory = ends.enter_context(connect(place["runtime_dir"]))
    return ShmTransport(ranks, memory), memory, ranks


def _set_bytes(memory: Client, rank: int) -> int:
    """Of the tensors in the sets that this rank has sealed."""
    num_bytes = 0
    for one in memory.statistics().weight_sets:
        if f"/{rank}/" in one.key:
            reader = memory.open_weight_set(one.key, None)
            assert isinstance(reader, WeightSetReader)
            num_bytes += sum(entry.num_bytes for entry in reader.manifest.tensors.values())
            reader.release()
    return num_bytes


def _poison(sharded: ShardedSeries) -> None:
    for series in sharded._series:
        for window in series._windows:
            window.fill_(255)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


class RankProcesses:
    """So many processes that wait to be asked. As a context they are ended."""

    def __init__(self, count: int) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.workers.placement.sharding_ranks"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        self._num_unanswered = [0] * count

    def ask(self, rank: int, method: str, **arguments: Any) -> None:
        """The answer is to be taken by `answer`."""
        getattr(Rank, method)
        pipe = self.processes[rank].stdin
        assert pipe is not None
        pipe.write(json.dumps([method, arguments]) + "\n")
        pipe.flush()
        self._num_unanswered[rank] += 1

    def answer(self, rank: int) -> Any:
        """To what was asked first. Fails where the rank did."""
        pipe = self.processes[rank].stdout
        assert pipe is not None
        line = pipe.readline()
        assert line, f"rank {rank} ended with status {self.processes[rank].wait()}"
        self._num_unanswered[rank] -= 1
        kind, value = json.loads(line)
        assert kind == "answer", f"rank {rank}: {value}"
        return value

    def asked(self, rank: int, method: str, **arguments: Any) -> Any:
        """What one rank alone answers."""
        self.ask(rank, method, **arguments)
        return self.answer(rank)

    def all(self, ranks: Iterable[int], method: str, **arguments: Any) -> list[Any]:
        """What they answer, having worked at once."""
        ranks = list(ranks)
        for rank in ranks:
            self.ask(rank, method, **arguments)
        return [self.answer(rank) for rank in ranks]

    def settle(self) -> None:
        """Wait for whatever has not been answered, where a test has failed before."""
        for rank, process in enumerate(self.processes):
            assert process.stdout is not None
            while self._num_unanswered[rank]:
                process.stdout.readline()
                self._num_unanswered[rank] -= 1

    def open(self, places: list[dict[str, Any]], **arguments: Any) -> list[Any]:
        """`Rank.open`, or what `method` says, of each at its place."""
        method = arguments.pop("method", "open")
        for place in places:
            self.ask(place["rank"], method, place=place, **arguments)
        return [self.answer(place["rank"]) for place in places]

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.processes:
            process.wait(DEADLINE_S)
            process.stdout.close()


def main() -> None:
    """Answer until nobody asks any more."""
    rank = Rank()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = ["answer", getattr(rank, method)(**arguments)]
        except BaseException:  # noqa: BLE001 - the test fails with it
            answer = ["failure", traceback.format_exc()]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
