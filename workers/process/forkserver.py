"""The forkserver: imports torch, transformers and the model's architecture once, then forks.

Owns the instances' processes: starts them, reaps them, reports their ends. Invariants: no thread,
no ZeroMQ context and no device call exists before a fork; neither it nor an instance outlives the
server, but an instance outlives it.

Started as `python -m workers.process.forkserver FD PIPE MODEL DTYPE [METADATA_FD]`, where FD is its
end of a SOCK_SEQPACKET pair, and it dies with whoever holds the other end of PIPE. METADATA_FD is a
file with the metadata of the weight set that is served already: then MODEL is not looked at.
"""

import contextlib
import gc
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from workers.process import linux

if TYPE_CHECKING:
    from workers.kv.common import CommonMemory
    from workers.process.rank_link import Link
    from workers.settings import EngineSettings

MAX_FRAME_BYTES: Final = 1 << 16


def main() -> int:
    """Serve until the other end closes."""
    started = time.monotonic()
    # The server decides when to stop; a Ctrl-C in its terminal reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    control, pipe, model, dtype, *descriptors = sys.argv[1:]
    linux.die_with(int(pipe))
    _preload(model, dtype, int(descriptors[0]) if descriptors else None)
    forkserver = Forkserver(socket.socket(fileno=int(control)), int(pipe))
    forkserver.run(import_ms=(time.monotonic() - started) * 1000)
    return 0


def _preload(model: str, dtype: str, descriptor: int | None) -> None:
    """Import what an instance of `model` needs, or of the set whose metadata the descriptor is open
    on. A model that can't be read is no error here: the instance will say what is wrong with it."""
    # Whoever asks torch on import whether there is a GPU must not initialise CUDA by that: it does
    # not survive a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # What is imported stays. To look for what does not takes a seventh of the time, and to free it
    # leaves holes in pages that all instances share, for each to write into and so to copy.
    gc.disable()
    import torch

    import workers.process.instance
    import workers.process.rank_follow  # noqa: F401 - what they need is imported here once
    from workers.checkpoint import metadata_of, open_checkpoint
    from workers.config.encoder_settings import task_of
    from workers.model import encoder as encoder
    from workers.model.decoder import preload

    try:
        if descriptor is None:
            metadata = metadata_of(open_checkpoint(model, dtype))
        else:
            with open(descriptor, "rb") as file:  # noqa: PTH123 - it has no path
                metadata = json.load(file)
        config = json.loads(metadata["config"])
        chosen = getattr(torch, metadata.get("dtype") or "float32")
        if task_of(metadata) == "embed":
            encoder.preload(config, chosen)
        else:
            preload(config, chosen)
    except Exception as error:  # noqa: BLE001 - see above
        logging.getLogger("onecopy.forkserver").debug("nothing preloaded: %s", error)
    # Objects that will never be freed leave the collector's lists, so that a collection in a child
    # does not touch, and so copy, the pages it shares with us.
    gc.freeze()
    gc.enable()


class Forkserver:
    """The loop: a request to fork, or a child's end."""

    def __init__(self, control: socket.socket, pipe: int):
        self._control = control
        self._pipe = pipe
        self._names: dict[int, str] = {}
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def run(self, import_ms: float) -> None:
        """Announce, then serve until the server closes its end."""
        from workers.messages import Up, encode

        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        try:
            self._control.send(encode(Up(pid=os.getpid(), import_ms=import_ms)))
        except BrokenPipeError:  # the server gave up while we imported
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wake_read in ready:
                    self._wake_read.recv(4096)
                    self._reap()
                if self._control in ready:
                    frame, descriptors = self._receive()
                    if not frame:
                        break
                    self._start(frame, descriptors, selector)
        # What is closed at the end must not be written to for a child that ends meanwhile.
        signal.set_wakeup_fd(-1)

    def _receive(self) -> tuple[bytes, list[int]]:
        """A request, with the pipe and the pulse of the instance that it asks for; nothing where
        the server is gone, whatever it left unread."""
        try:
            frame, descriptors, _, _ = socket.recv_fds(self._control, MAX_FRAME_BYTES, 2)
        except ConnectionResetError:
            return b"", []
        return frame, descriptors

    def _start(
        self, frame: bytes, descriptors: Sequence[int], selector: selectors.BaseSelector
    ) -> None:
        from workers.messages import Started, decode_start, encode

        spec = decode_start(frame).spec
        pid = os.fork()
        if pid == 0:
            _become_instance(self, selector, frame, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._names[pid] = spec.name
        with contextlib.suppress(BrokenPipeError):  # the server is gone; the loop sees it next
            self._control.send(encode(Started(name=spec.name, pid=pid)))

    def _reap(self) -> None:
        from workers.messages import Exited, encode

        while self._names:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            status = os.waitstatus_to_exitcode(wait_status)
            name = self._names.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # as above
                self._control.send(encode(Exited(name=name, pid=pid, status=status)))

    def release_in_child(self, selector: selectors.BaseSelector) -> None:
        """Drop what belongs to the parent."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        selector.close()
        self._control.close()
        os.close(self._pipe)
        self._wake_read.close()
        self._wake_write.close()


def _become_instance(
    forkserver: Forkserver, selector: selectors.BaseSelector, frame: bytes, pipe: int, pulse: int
) -> None:
    """In the child: run the instance and end the process. Never returns."""
    status = 1
    try:
        from workers.messages import decode_start
        from workers.process import instance
        from workers.process.pulse import Pulse
        from workers.process.rank_processes import RankProcesses

        linux.die_with(pipe)
        forkserver.release_in_child(selector)
        spec = decode_start(frame).spec
        processes = None
        if (size := spec.settings.num_ranks) > 1:
            work = partial(_work_of_rank, settings=spec.settings)
            processes = RankProcesses(spec.name, size, (pipe, pulse), work)
        status = instance.run(spec, Pulse(pulse), processes)
    except BaseException:
        logging.getLogger("onecopy.instance").exception("an instance ended by an error of ours")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: the parent's exit handlers and buffers are not ours to run.
        os._exit(status)


def _work_of_rank(
    rank: int, link: "Link", memory: "CommonMemory", settings: "EngineSettings"
) -> int:
    from workers.process.node_pinning import pin_rank
    from workers.process.rank_follow import follow

    pin_rank(rank, settings)
    return follow(rank, settings.num_ranks, link, memory)


if __name__ == "__main__":
    sys.exit(main())
