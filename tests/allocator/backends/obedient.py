"""The other end of a test that drives a second process: it obeys what comes by a socket.

That is one JSON list, the name of a method, its arguments in order and those by name, with a
descriptor or none; the answer is {"value": ...}, with a descriptor or none, or {"error": ...,
"message": ...}.
"""

import json
import os
import resource
import socket


class Obedient:
    """What obeys: its public methods are what it can be told to do."""

    descriptor: int | None = None
    """What came with the command; closed after it."""
    exported: int | None = None
    """What goes with the answer; closed after it."""

    def obey(self, socket_fd: int) -> None:
        """Until the socket ends."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a death by SIGSEGV may be wanted
        with socket.socket(fileno=socket_fd) as connection:
            while True:
                request, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 1)
                if not request:
                    return
                method, given, named = json.loads(request)
                self.descriptor = descriptors[0] if descriptors else None
                self.exported = None
                try:
                    answer = {"value": getattr(self, method)(*given, **named)}
                except Exception as error:  # noqa: BLE001 - whatever it is, the test wants it
                    answer = {"error": type(error).__name__, "message": str(error)}
                to_send = [] if self.exported is None else [self.exported]
                socket.send_fds(connection, [json.dumps(answer).encode()], to_send)
                for descriptor in (*descriptors, *to_send):
                    os.close(descriptor)
