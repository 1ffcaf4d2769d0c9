"""The clients that are connected, and those of an earlier daemon that have not come back yet.

Owns the table of sessions. Invariant: a session lives exactly as long as its lifeline is open or,
once adopted, as its process lives or until that process resumes it. Knows nothing of what they
hold.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from allocator.daemon.journal.records import SessionBegan
from allocator.processes.identity import ProcessIdentity


@dataclass(eq=False)
class Session:
    """One client. `token` goes with its requests; `number` never repeats."""

    number: int
    process: ProcessIdentity
    token: bytes = field(repr=False)
    device: str
    model: str
    user: str
    label: str
    lifeline: socket.socket | None = field(default=None, repr=False)
    pidfd: int = -1

    @classmethod
    def of(cls, record: SessionBegan) -> Self:
        """As an earlier daemon noted it."""
        process = ProcessIdentity(record.pid, record.start_ticks)
        return cls(
            *(record.number, process, record.token),
            *(record.device, record.model, record.user, record.label),
        )

    def record(self) -> SessionBegan:
        """For the next daemon."""
        return SessionBegan(
            number=self.number,
            pid=self.process.pid,
            start_ticks=self.process.start_ticks,
            token=self.token,
            device=self.device,
            model=self.model,
            user=self.user,
            label=self.label,
        )

    @property
    def adopted(self) -> bool:
        """Whether its client has not come back since the daemon was replaced."""
        return self.lifeline is None

    @property
    def fd(self) -> int:
        """Readable when it ends."""
        return self.pidfd if self.lifeline is None else self.lifeline.fileno()

    def close(self) -> None:
        """Drop what tells of its end."""
        if self.lifeline is not None:
            self.lifeline.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Sessions:
    """All sessions of one daemon."""

    def __init__(self) -> None:
        self._by_fd: dict[int, Session] = {}
        self._by_token: dict[bytes, Session] = {}
        self._by_number: dict[int, Session] = {}
        self._last = 0

    def __iter__(self) -> Iterator[Session]:
        return iter(self._by_number.values())

    def __len__(self) -> int:
        return len(self._by_number)

    def next_number(self) -> int:
        """A number that no session had."""
        self._last += 1
        return self._last

    def add(self, session: Session) -> None:
        """It has begun."""
        self._by_fd[session.fd] = session
        self._by_token[session.token] = session
        self._by_number[session.number] = session
        self._last = max(self._last, session.number)

    def adopt(self, session: Session) -> bool:
        """Take over an earlier daemon's; False where its process is gone. Raises OSError where that
        can't be found out: what it holds must not be taken for free then."""
        try:
            session.pidfd = os.pidfd_open(session.process.pid)
        except ProcessLookupError:
            return False
        if not session.process.is_alive():  # asked after the pidfd, so that it is the same process
            session.close()
            return False
        self.add(session)
        return True

    def resume(self, token: bytes, pid: int, lifeline: socket.socket) -> Session | None:
        """An adopted session's client is back."""
        session = self._by_token.get(token)
        if session is None or not session.adopted or session.process.pid != pid:
            return None
        del self._by_fd[session.fd]
        session.close()
        session.lifeline = lifeline
        self._by_fd[session.fd] = session
        return session

    def remove(self, session: Session) -> None:
        """It has ended."""
        del self._by_fd[session.fd], self._by_token[session.token]
        del self._by_number[session.number]
        session.close()

    def by_fd(self, fd: int) -> Session | None:
        """Whose end this descriptor tells."""
        return self._by_fd.get(fd)

    def by_token(self, token: bytes) -> Session | None:
        """Who sent this request."""
        return self._by_token.get(token)

    def by_number(self, number: int) -> Session | None:
        """None once it has ended."""
        return self._by_number.get(number)

    def pid(self, number: int) -> int:
        """0 once it has ended."""
        session = self._by_number.get(number)
        return session.process.pid if session is not None else 0
