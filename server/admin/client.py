"""The admin API, as the command line and other programs on this machine ask it.

Invariant: every wait is bounded, and whatever goes wrong is an AdminError that says what to do.
"""

from http import HTTPStatus
from typing import Final

import httpx
from pydantic import BaseModel, ValidationError

from allocator import RuntimeDir
from server.admin.schemas import KeepAllocator, Refusal, Reload, Scale, ServerStatus, Sleep, Stop

_TIMEOUT_S: Final = 10.0
_SLEEP_TIMEOUT_S: Final = 3600.0
"""Moving weights, or loading them, takes as long as they are large."""


class AdminError(Exception):
    """Base: the server did not do what was asked. The message names what to do."""


class NoServer(AdminError):
    """No server runs in the runtime directory."""


class ServerSilent(AdminError):
    """A server runs, and does not answer in time."""


class ServerFailed(AdminError):
    """A server runs, and answered with an error of its own, or with what is no answer."""


class Refused(AdminError):
    """A server runs, and can't do that now. Its own words."""


class AdminClient:
    """Raises AdminError: NoServer where none runs. `model` None: the only one."""

    def __init__(self, runtime_dir: RuntimeDir, timeout_s: float = _TIMEOUT_S):
        self._runtime_dir = runtime_dir
        self._timeout_s = timeout_s

    def status(self) -> ServerStatus:
        """What the server says of itself."""
        return self._request("GET", "/status")

    def scale(self, num_instances: int, model: str | None = None) -> ServerStatus:
        """Ask for another number of instances; answered before they are ready."""
        return self._request("PUT", "/instances", Scale(num_instances=num_instances, model=model))

    def keep_allocator(self) -> ServerStatus:
        """Let the allocator go on when the server ends."""
        return self._request("PUT", "/allocator", KeepAllocator(keep=True))

    def reload(self, model: str | None = None) -> ServerStatus:
        """Serve the model as it lies on disk now; answered once that is so. Raises Refused."""
        return self._request("PUT", "/reload", Reload(model=model), _SLEEP_TIMEOUT_S)

    def stop(self, *, now: bool) -> ServerStatus:
        """Ask the server to end after its requests, or `now`; what it said of itself then."""
        return self._request("PUT", "/stop", Stop(now=now))

    def sleep(self, level: int, model: str | None = None) -> ServerStatus:
        """Put the model to sleep (1 or 2), or wake it (0); answered once that is so. Raises
        Refused."""
        return self._request("PUT", "/sleep", Sleep(level=level, model=model), _SLEEP_TIMEOUT_S)

    def _request(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        timeout_s: float | None = None,
    ) -> ServerStatus:
        """What the server answers."""
        timeout = httpx.Timeout(self._timeout_s, read=timeout_s or self._timeout_s)
        try:
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=str(self._runtime_dir.admin)),
                base_url="http://admin",
                timeout=timeout,
            ) as client:
                told = body.model_dump() if body is not None else None
                answer = client.request(method, path, json=told)
        except httpx.TimeoutException as error:
            raise ServerSilent(
                f"the server{self._pid()} in {self._runtime_dir.path} does not answer within "
                f"{timeout.read:.0f} s: if it was stopped, go on with it (`kill -CONT`); else end "
                "it with `onecopy stop`, and start it again"
            ) from error
        except httpx.ConnectError as error:
            raise NoServer(
                f"no server answers in {self._runtime_dir.path}: start one with `onecopy serve`, "
                "or name its directory with --runtime-dir"
            ) from error
        except httpx.HTTPError as error:
            raise ServerFailed(
                f"the server{self._pid()} in {self._runtime_dir.path} broke off its answer to "
                f"{method} {path} ({error}): its log says why, if it still runs"
            ) from error
        try:
            if answer.status_code == HTTPStatus.CONFLICT:
                raise Refused(Refusal.model_validate_json(answer.content).detail)
            answer.raise_for_status()
            return ServerStatus.model_validate_json(answer.content)
        except (httpx.HTTPStatusError, ValidationError) as error:
            raise ServerFailed(
                f"the server{self._pid()} in {self._runtime_dir.path} answered {method} {path} "
                f"with status {answer.status_code}, and not as this onecopy expects: its log says "
                "why; after an upgrade, start it again"
            ) from error

    def _pid(self) -> str:
        owner = self._runtime_dir.owner("server")
        return f" (pid {owner.pid})" if owner is not None else ""
