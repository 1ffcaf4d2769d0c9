"""The cells of an instance's grammars: one for each that is followed, whoever follows it.

Owns the instance's warden (`workers.process.warden`), its cells, and what becomes of sequences
whose cell ends. Invariants: nothing here waits longer than it is told to; a cell that is lost costs
its sequences time and nothing else; one that met a bound ends those sequences alone that could have
taken it there. Knows neither logits nor requests. One thread calls it.
"""

import contextlib
import itertools
import logging
import select
import socket
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from workers.grammar.cell import Cell
from workers.grammar.follower import Compile, Position
from workers.grammar.grammar import Grammar
from workers.messages import GrammarSpec
from workers.process import warden

if TYPE_CHECKING:
    import subprocess


log = logging.getLogger("onecopy.instance")

# More of each than the server grants to whoever tries a grammar out, so that what passed there
# passes here.
_GRANT: Final = warden.Grant(cpu_s=6.0, memory_bytes=256 << 20, stack_bytes=64 << 20)
_MOST_CELLS: Final = 64
_MOST_IDLE: Final = 8
"""Cells that nobody uses and that are kept, since a grammar often comes again."""
_SILENCE_S: Final = 15.0
_FIRST_SILENCE_S: Final = 40.0
"""How long a cell may take to answer, and to compile before, on however busy a machine."""
_PATIENCE_S: Final = 2.0
"""How long a warden may take to end a cell."""
_MOST_LOSSES: Final = 3
_EXCESS: Final[Mapping[warden.Bound, str]] = {
    "time": "it took too long",
    "memory": "it took too much memory",
    "stack": "it is nested too deeply",
}


class GrammarCells:
    """What an instance asks of its grammars. Nothing is started before the first comes."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Collection[int]):
        self._setup = {
            "tokenizer": str(tokenizer),
            "vocab_size": vocab_size,
            "eos_token_ids": sorted(eos_token_ids),
        }
        self._mask_bytes = -(-vocab_size // 8)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._numbers = itertools.count()
        self._cells: dict[int, Cell] = {}
        self._by_spec: OrderedDict[GrammarSpec, Cell] = OrderedDict()
        """Those that newcomers may join, the one that was joined last at the end."""
        self._queue: deque[Grammar] = deque()
        """Those for which there is no cell yet."""

    def begin(self, grammar: Grammar) -> None:
        """Let a cell follow this sequence, from all its tokens on. Answered by `receive`."""
        cell = None if grammar.alone else self._by_spec.get(grammar.spec)
        if cell is None:
            self._make_room()
            if len(self._cells) >= _MOST_CELLS:
                grammar.cell = -1
                self._queue.append(grammar)
                return
            cell = self._started(grammar.spec)
            if cell is None:
                grammar.failed("no process for its grammar could be started", invalid=False)
                return
            if not grammar.alone:
                self._by_spec[grammar.spec] = cell
        else:
            self._by_spec.move_to_end(grammar.spec)
        grammar.cell = cell.number
        cell.join(grammar)
        self._ask(cell, grammar)

    def accept(self, grammar: Grammar) -> None:
        """The sequence has gone on by a token. Answered by `receive`."""
        cell = self._cells.get(grammar.cell)
        # Else it has been lost, and whoever takes over is told all tokens.
        if cell is not None and grammar.number in cell.users:
            self._ask(cell, grammar)

    def leave(self, grammar: Grammar) -> None:
        """Nobody follows this sequence any more."""
        with contextlib.suppress(ValueError):
            self._queue.remove(grammar)
        cell = self._cells.get(grammar.cell)
        if cell is None or grammar.number not in cell.users:
            return
        cell.leave(grammar.number)
        self._tell(cell)
        self._release(cell)

    def receive(self, timeout_s: float, *, late_too: bool = False) -> None:
        """Take the answers that have come, and wait so long for those that nobody has waited for
        before; `late_too`: for any."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._take()
            owing = [one for one in self._cells.values() if one.waiting]
            awaited = [one for one in owing if late_too or not one.is_late]
            left_s = deadline - time.monotonic()
            if not awaited or left_s <= 0:
                break
            self._poll(awaited, left_s)
            if late_too:  # one is enough
                self._take()
                return
        for cell in awaited if timeout_s > 0 else ():
            cell.is_late = True

    def close(self) -> None:
        """End all cells, and leave those who use them where they are."""
        self._queue.clear()
        for cell in self._cells.values():
            cell.users.clear()
        self._drop_warden()

    # --- talking to cells

    def _ask(self, cell: Cell, grammar: Grammar) -> None:
        cell.ask(grammar.number)
        self._tell(cell)

    def _tell(self, cell: Cell) -> None:
        """As far as it reads; how long that may take, `_watch` knows."""
        if cell.killed_at is not None:
            return
        try:
            cell.tell()
        except OSError:  # its end comes from the warden
            self._kill(cell)

    def _take(self) -> None:
        for cell in list(self._cells.values()):
            if cell.number in self._cells:
                self._tell(cell)
                self._take_answers(cell)
        if self._control is not None:
            self._take_ends(self._control)
        self._watch()

    def _take_answers(self, cell: Cell) -> None:
        while cell.waiting and cell.number in self._cells:
            try:
                answer = cell.answer()
            except OSError:  # its end comes from the warden
                self._kill(cell)
                return
            except msgspec.DecodeError as error:
                self._distrust(cell, error)
                return
            if answer is None:
                return
            if answer.sequence is None:
                self._forget(cell)  # it could not be compiled
                for grammar in cell.users.values():
                    grammar.failed(answer.message)
                self._serve_queue()
                return
            named = cell.users.get(answer.sequence)
            if named is None:
                continue  # it has left
            if isinstance(answer, Position):
                named.came(answer)
            else:
                self._blame(named, cell, answer.message)
                self._release(cell)

    def _distrust(self, cell: Cell, error: msgspec.DecodeError) -> None:
        """What it says makes no sense: its memory is not what it should be. Where several use it,
        one's text may have done that, so each goes on in a cell of its own."""
        log.warning("a cell of a grammar answered what makes no sense, and is ended: %s", error)
        self._kill(cell)
        self._forget(cell)
        for grammar in list(cell.users.values()):
            grammar.alone = grammar.alone or cell.was_shared
            self._lost(grammar)
        self._serve_queue()

    def _take_ends(self, control: socket.socket) -> None:
        while True:
            try:
                ended = warden.receive(control)
            except OSError:
                log.warning("the warden of the grammars ended; starting another")
                self._drop_warden()
                return
            if ended is None:
                return
            cell = self._cells.get(ended.id)
            if cell is not None:
                self._take_answers(cell)  # what it said last
            if ended.id in self._cells:
                self._ended(self._cells[ended.id], ended)

    def _watch(self) -> None:
        """A cell that does not answer is ended, a warden that does not end it as well."""
        now = time.monotonic()
        for cell in list(self._cells.values()):
            if cell.killed_at is not None:
                if now - cell.killed_at > _PATIENCE_S:
                    log.warning("the warden of the grammars does not answer; starting another")
                    self._drop_warden()
                    return
                continue
            patience_s = _SILENCE_S if cell.has_answered else _FIRST_SILENCE_S
            if cell.waiting and now - cell.asked_at > patience_s:
                self._kill(cell)

    def _poll(self, cells: Collection[Cell], timeout_s: float) -> None:
        poller = select.poll()
        for cell in cells:
            if cell.killed_at is None:
                writable = select.POLLOUT if cell.has_untold else 0
                poller.register(cell.link, select.POLLIN | writable)
        if self._control is not None:
            poller.register(self._control, select.POLLIN)
        poller.poll(timeout_s * 1000)

    # --- the life of cells

    def _started(self, spec: GrammarSpec) -> Cell | None:
        """A new cell; None where none can be had."""
        for _ in range(2):
            try:
                return self._start(spec)
            except OSError as error:  # the warden may have ended a moment ago
                log.warning("a cell for a grammar could not be started: %s", error)
                self._drop_warden()
        return None

    def _start(self, spec: GrammarSpec) -> Cell:
        if self._control is None:
            self._process, self._control = warden.launch("workers.grammar.follower", self._setup)
            self._finalizer = weakref.finalize(self, _end, self._process, self._control)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        cell = Cell(next(self._numbers), spec, ours, self._mask_bytes)
        with theirs:
            try:
                ours.setblocking(False)
                ours.send(msgspec.msgpack.encode(Compile(spec.kind, spec.source)))
                task = warden.Task(cell.number, "follow", {}, _GRANT)
                warden.send(self._control, task, theirs.fileno())
            except OSError:
                ours.close()
                raise
        self._cells[cell.number] = cell
        return cell

    def _kill(self, cell: Cell) -> None:
        if cell.killed_at is not None or self._control is None:
            return
        cell.killed_at = time.monotonic()
        with contextlib.suppress(OSError):  # a warden that is gone shows in `_take_ends`
            warden.send(self._control, warden.Kill(cell.number))

    def _ended(self, cell: Cell, ended: warden.Ended) -> None:
        """A cell that was used has ended."""
        self._forget(cell)
        if cell.users and ended.exceeded is None:
            log.warning("the cell of a grammar ended with status %d", ended.status)
        for grammar in list(cell.users.values()):
            if ended.exceeded is not None:
                self._blame(grammar, cell, _EXCESS[ended.exceeded])
            elif ended.status == 1:
                grammar.failed("an error of ours, which is in the log", invalid=False)
            else:
                self._lost(grammar)
        self._serve_queue()

    def _blame(self, grammar: Grammar, cell: Cell, message: str) -> None:
        """A sequence can't go on. Where others have used its cell, that may be their doing: then it
        is tried again in one of its own."""
        cell.drop(grammar.number)
        if cell.has_answered and cell.was_shared:
            if self._by_spec.get(cell.spec) is cell:
                del self._by_spec[cell.spec]  # nobody is to join it any more
            grammar.alone = True
            self.begin(grammar)
        else:
            grammar.failed(message)

    def _lost(self, grammar: Grammar) -> None:
        grammar.num_losses += 1
        if grammar.num_losses > _MOST_LOSSES:
            problem = "the process that follows its grammar ended again and again"
            grammar.failed(problem, invalid=False)
        else:
            self.begin(grammar)

    def _forget(self, cell: Cell) -> None:
        """It ends with its link."""
        cell.link.close()
        self._cells.pop(cell.number, None)
        if self._by_spec.get(cell.spec) is cell:
            del self._by_spec[cell.spec]

    def _release(self, cell: Cell) -> None:
        """Somebody has left it. One that nobody uses is kept for a while, if others may join it."""
        if not cell.users and self._by_spec.get(cell.spec) is not cell:
            self._forget(cell)
        idle = [one for one in self._by_spec.values() if not one.users]
        for one in idle[: max(0, len(idle) - _MOST_IDLE)]:
            self._forget(one)
        self._serve_queue()

    def _make_room(self) -> None:
        """For one more, if somebody's has no user: the one that was joined longest ago goes."""
        idle = [one for one in self._by_spec.values() if not one.users]
        if idle and len(self._cells) >= _MOST_CELLS:
            self._forget(idle[0])

    def _serve_queue(self) -> None:
        while self._queue and len(self._cells) < _MOST_CELLS:
            self.begin(self._queue.popleft())

    def _drop_warden(self) -> None:
        """End it and its cells; those who used them begin anew."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._control = self._finalizer = None
        users = [grammar for cell in self._cells.values() for grammar in cell.users.values()]
        for cell in list(self._cells.values()):
            self._forget(cell)
        for grammar in users:
            self._lost(grammar)


def _end(process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
    control.close()
    process.kill()
    process.wait()
