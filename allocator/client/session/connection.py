"""One session with the allocator, as requests and replies.

Owns the session's lifeline and its ZeroMQ socket. Invariants: every wait is bounded; requests are
correlated, so that a late reply to one that was given up is never taken for another's; once the
allocator is gone a call says so, and the next one tries its successor, which then holds for this
session what this process knows of, and nothing else. Who must not be held up says `hurry`: a silent
allocator then costs one short wait, and is asked again by a thread of its own. Thread-safe: one
request is on its way at a time. A forked child can't use it, nor harm it. Knows nothing of what is
asked.
"""

import contextlib
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import msgspec
import zmq

from allocator import messages
from allocator.client.session import forks, forsaken, request_socket
from allocator.client.session.ledger import Ledger
from allocator.client.session.silence import Silence
from allocator.client.session.turns import Turns
from allocator.errors import (
    BY_CODE,
    AllocatorError,
    AllocatorGone,
    InvalidMessage,
    Unanswered,
    WaitTimeout,
)
from allocator.lifeline import Lifeline
from allocator.messages import Hello, Welcome
from allocator.processes.process_state import ProcessState
from allocator.requests import REPEATABLE, mappable
from allocator.runtime_dir import RuntimeDir

log = logging.getLogger("onecopy.allocator")

REQUEST_TIMEOUT_S: Final = 30.0
_HURRIED_CONNECT_S: Final = 2.0
_PROMPT_S: Final = 0.05
"""An allocator that is not stopped has answered by then, unless it or the machine is busy."""
_SLICE_S: Final = 0.25
"""How often a long wait looks whether the session is to end."""
_EXPORTING: Final = "cuda"
"""The backend whose handles alone map nothing: a descriptor comes with each."""
_CLOSE_S: Final = 1.0
"""How long the end of a session waits for a thread that asks a silent allocator."""


class _Lost(Unanswered):
    """The daemon lives, and says that it has lost something."""


R = TypeVar("R", bound=messages.Message)


class Connection:
    """A session that goes on with the next daemon of the runtime directory, if that adopted it."""

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        hello: Hello,
        timeout_s: float,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ):
        """`timeout_s` bounds the connecting, `request_timeout_s` each request."""
        self._runtime_dir = runtime_dir
        self._hello = hello
        self._timeout_s = timeout_s
        self._request_timeout_s = request_timeout_s
        self._patience_s: float | None = None
        self._silence: Silence | None = None
        self._given_up: deque[messages.Request] = deque()  # since the ledger was last looked at
        self._owner_pid = os.getpid()
        self._turns = Turns()
        self._request_ids = itertools.count(1)
        self._context = zmq.Context(io_threads=1)
        self._closed = self._ends = False
        self._ledger = Ledger()
        self._is_behind = False
        """Whether the allocator may hold something else for this session than the ledger says."""
        self._is_cut = False
        """Whether what is sent over the socket may go nowhere, so that it has to begin anew."""
        self._num_missed = 0
        self.epoch = 0
        """Grows whenever a session began that holds nothing of what the last one held."""
        try:
            self._begin(hello)
        except BaseException:
            self._context.term()
            raise
        forks.watch(self)
        forsaken.end_all(timeout_s)

    def hurry(self, patience_s: float, tell: Callable[[float | None], None]) -> None:
        """From now on no call waits longer than `patience_s` for the allocator, and none waits at
        all for one that did not answer the last: they raise AllocatorSilent until it does. `tell`
        hears of that as `Silence` says."""
        self._patience_s = patience_s
        self._timeout_s = _HURRIED_CONNECT_S
        self._silence = Silence(self._ask_again, tell)

    @property
    def welcome(self) -> Welcome:
        """What the daemon said of itself."""
        return self._lifeline.welcome

    def request(
        self, message: messages.Request, expected: type[R], *, epoch: int | None = None
    ) -> R:
        """One round trip. Raises what the allocator answered with, AllocatorGone or WaitTimeout;
        AllocatorGone also where something is meant for another `epoch` than this one."""
        answer, descriptors = self.exchange(message, epoch)
        for descriptor in descriptors:
            os.close(descriptor)
        return expect(answer, expected)

    def exchange(
        self, message: messages.Request, epoch: int | None = None
    ) -> tuple[messages.Reply, list[int]]:
        """One round trip: the reply, and the descriptors of its handles, the caller's to close.
        Raises as `request` does."""
        self.check_owner()  # before the lock, which a lost thread may hold
        frame = messages.encode(message)
        if len(frame) > messages.MAX_FRAME_BYTES:
            raise InvalidMessage(
                f"the request takes {len(frame)} bytes, at most {messages.MAX_FRAME_BYTES} can be "
                "sent"
            )
        with self._heard(), self._turns.taken(self._patience_s):
            if self._closed:
                raise AllocatorGone("this session is closed")
            patience_s = self._request_timeout_s if self._patience_s is None else self._patience_s
            patience_s += getattr(message, "wait_ms", 0) / 1000
            deadline = time.monotonic() + patience_s
            while True:
                self._catch_up(patience_s, resume=self._patience_s is None)
                if epoch not in (None, self.epoch):
                    text = "the allocator that knew of this ended; its successor does not"
                    raise AllocatorGone(text)
                try:
                    reply, descriptors = self._exchange(message, frame, patience_s)
                    break
                except _Lost:
                    if type(message) not in REPEATABLE or time.monotonic() > deadline:
                        raise
        if isinstance(reply, messages.Failed):
            raise BY_CODE.get(reply.code, AllocatorError)(reply.message)
        return reply, descriptors

    def give_back(self, message: messages.Request) -> None:
        """As `request`, for what gives something up and is answered by Done. Where no allocator
        answers, it is given up for this process, and the next one that adopts the session is told
        before anything else."""
        try:
            self.request(message, messages.Done)
        except (AllocatorGone, WaitTimeout) as error:
            if self._closed or self.is_inherited:
                raise
            self.give_up(message)
            if isinstance(error, WaitTimeout):
                raise

    def give_up(self, message: messages.Request) -> None:
        """As `give_back`, but let the allocator hear of it before the next request only. Never
        waits."""
        self._given_up.append(message)

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child, whose parent's session it is."""
        return self._owner_pid != os.getpid()

    def check_owner(self) -> None:
        """Raises AllocatorGone in a forked child."""
        if self.is_inherited:
            raise AllocatorGone("this session belongs to the parent process: connect() anew")

    def is_alive(self) -> bool:
        """Whether the allocator still holds this session."""
        return not self._closed and self._lifeline.is_open()

    def close(self) -> None:
        """End the session: the allocator takes back all it held. Idempotent. Waits for the request
        that another thread has on its way."""
        if self.is_inherited:
            self.drop_inherited()
            return
        if self._silence is not None:
            self._silence.close()
            self._ends = True
            # The thread that asks may be in the middle of it; only the process's end is quicker.
            with contextlib.suppress(WaitTimeout), self._turns.taken(_CLOSE_S):
                self._close()
            return
        with self._turns.taken():
            self._close()
        forsaken.end_all(self._timeout_s)

    # --- steps

    def _exchange(
        self, message: messages.Request, frame: bytes, patience_s: float
    ) -> tuple[messages.Reply, list[int]]:
        self._is_behind, missed = True, self._num_missed
        request_id = self._send(frame)
        reply = self._await(request_id, patience_s)
        count = sum(handle.backend == _EXPORTING for handle, _ in mappable(reply))
        descriptors: list[int] = []
        if count:
            try:
                descriptors = self._lifeline.descriptors(request_id, count, patience_s)
            except Unanswered as error:  # the reply came, but nothing can be mapped by it
                raise _Lost(str(error)) from error
        self._is_behind = self._num_missed > missed
        self._ledger.enter(message, reply)
        return reply, descriptors

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._lifeline.is_open():
            forsaken.add(self._runtime_dir.lifeline, self._resuming())
        self._end()
        self._context.term()

    def _begin(self, hello: Hello) -> None:
        """Where it fails the lifeline and socket of before are still there."""
        # First: it may fail, and a session that was resumed must not end over that.
        opened = request_socket.opened(self._context)
        try:
            lifeline = Lifeline.connect(self._runtime_dir.lifeline, self._timeout_s, hello)
        except BaseException:
            opened.close(0)
            raise
        self._lifeline = lifeline
        self._connect_socket(opened)

    def _connect_socket(self, opened: "zmq.Socket[bytes]") -> None:
        self._socket = opened
        self._is_cut = False
        request_socket.connect(opened, self._lifeline.welcome)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._lifeline.connection.fileno(), zmq.POLLIN)

    def _end(self) -> None:
        self._lifeline.close()
        self._socket.close(0)

    def _resume(self) -> None:
        """The daemon is gone: take up the session with its successor, if there is one."""
        hello = self._resuming()
        ended = self._lifeline, self._socket
        try:
            self._begin(hello)
        except AllocatorGone as error:
            raise AllocatorGone(
                "the allocator ended. Mapped memory stays valid; ask again once a new allocator "
                f"runs ({error})"
            ) from error
        ended[0].close()
        ended[1].close(0)
        if not self._lifeline.welcome.resumed:
            self.epoch += 1
            self._ledger.clear()

    def _ask_again(self) -> None:
        """The allocator was silent: wait for it, or for its successor, as long as it takes."""
        with self._turns.taken():
            if not self._closed:
                self._is_behind = True
                self._catch_up(self._request_timeout_s, resume=True)

    def _catch_up(self, patience_s: float, *, resume: bool) -> None:
        """See that allocator and ledger agree; `resume` the session with another allocator where
        this one has ended. What is lost meanwhile is asked again. Raises AllocatorGone,
        WaitTimeout."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return self._catch_up_once(patience_s, resume=resume)
            except Unanswered as error:  # of what is asked now, nothing was sent
                if not isinstance(error, _Lost) or time.monotonic() > deadline:
                    raise AllocatorGone(str(error)) from error

    def _catch_up_once(self, patience_s: float, *, resume: bool) -> None:
        """As `_catch_up`. Raises Unanswered, too."""
        while self._given_up:
            self._ledger.enter(self._given_up.popleft(), messages.Done())
            self._is_behind = True
        is_quiet = self._lifeline.is_quiet()
        if not is_quiet:
            self._is_cut = self._lifeline.take_loss(between_requests=True) or self._is_cut
        if self._is_cut:
            self._reconnect_socket()
        if not is_quiet and not self._lifeline.is_open():
            if not resume:
                raise AllocatorGone("the allocator ended; mapped memory stays valid")
            self._resume()
            self._is_behind = True
        if not self._is_behind:
            return
        for request in self._ledger.differing(self._holdings(patience_s)):
            reply = self._await(self._send(messages.encode(request)), patience_s)
            if isinstance(reply, messages.Failed):
                log.warning("the session holds more than it uses: %s", reply.message)
        self._is_behind = False

    def _holdings(self, patience_s: float) -> Iterator[messages.Holdings]:
        for page in itertools.count():
            request_id = self._send(messages.encode(messages.GetHoldings(page=page)))
            holdings = expect(self._await(request_id, patience_s), messages.Holdings)
            yield holdings
            if not holdings.more:
                return

    def _reconnect_socket(self) -> None:
        """The daemon has begun its own anew: what this one has accepted may go nowhere."""
        opened = request_socket.opened(self._context)
        self._socket.close(0)
        self._connect_socket(opened)

    def _send(self, frame: bytes) -> bytes:
        request_id = next(self._request_ids).to_bytes(messages.REQUEST_ID_BYTES, "big")
        self._socket.send_multipart([request_id, self._lifeline.welcome.token, frame])
        return request_id

    def _resuming(self) -> Hello:
        return msgspec.structs.replace(self._hello, resume=self._lifeline.welcome.token)

    def drop_inherited(self) -> None:
        """In a forked child: the parent's session must not live on because our copy of its lifeline
        does. What ZeroMQ holds belongs to threads that were not forked, so it is left alone."""
        self._closed = True
        self._lifeline.close()

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """Who is in a hurry does not wait for an allocator that did not answer the last time."""
        if self._silence is None:
            yield
            return
        self._silence.check()
        try:
            yield
        except (AllocatorGone, WaitTimeout) as error:
            if isinstance(error, WaitTimeout) or not self._lifeline.is_open():
                self._silence.begin()
            raise

    def _await(self, request_id: bytes, patience_s: float) -> messages.Reply:
        begun = time.monotonic()
        slice_s = _SLICE_S if self._patience_s is None else _PROMPT_S
        while (left_s := begun + patience_s - time.monotonic()) > 0:
            events = dict(self._poller.poll(int(min(left_s, slice_s) * 1000) + 1))
            if not events:
                self._look_around()
                slice_s = _SLICE_S
                continue
            if self._socket in events:
                answered, frame = self._socket.recv_multipart()
                if answered != request_id:  # the answer to a request that was given up
                    self._num_missed += 1
                    continue
                try:
                    return messages.decode_reply(frame)
                except msgspec.DecodeError as error:
                    raise InvalidMessage(f"not a reply: {error}") from error
            if self._lifeline.take_loss():
                self._is_cut = True
                raise _Lost("the allocator has lost this request or its answer: ask again")
            if not self._lifeline.is_open():
                raise Unanswered(
                    "the allocator ended before it answered. Mapped memory stays valid; ask again "
                    "once a new allocator runs"
                )
        raise WaitTimeout(f"the allocator did not answer within {patience_s:.1f} s")

    def _look_around(self) -> None:
        """Nothing came. Raises AllocatorGone where the session is to end, and WaitTimeout where who
        is in a hurry would wait in vain."""
        if self._ends:
            raise AllocatorGone("this session is about to be closed")
        if self._silence is not None and self._silence.since is None:
            state = ProcessState.of(self._lifeline.welcome.pid)
            if state is not None and state.is_stopped:
                raise WaitTimeout("the allocator is stopped")


def expect(answer: messages.Reply, expected: type[R]) -> R:
    """The answer as what it should be. Raises InvalidMessage."""
    if not isinstance(answer, expected):
        raise InvalidMessage(f"unexpected answer {type(answer).__name__}")
    return answer
