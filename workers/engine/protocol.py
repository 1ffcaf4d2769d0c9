"""What an instance's process asks of its engine, whatever the model is for."""

from typing import Final, Protocol

from workers.messages import Embed, Embedded, Generate, Output, StepOutput

OTHER_TASK: Final = "the instance can't take the request: this model does not serve that kind"


class Engine(Protocol):
    """Computes for many requests at once. One thread calls it."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""

    @property
    def is_stalled(self) -> bool:
        """Whether the last step could do nothing for now. Another makes sense after a while."""

    def add(self, request: Generate | Embed) -> None:
        """Take a request. It never raises: what can't be served, also since this model is for
        another task, is answered by the next `step`."""

    def refuse(self, request_id: str, problem: str) -> None:
        """Let the next `step` answer a request that can't be taken."""

    def abort(self, request_id: str) -> None:
        """Forget a request and free its memory now. Unknown ids are ignored."""

    def step(self) -> tuple[Output | Embedded, ...]:
        """Compute one batch. Returns what is new. Raises nothing that a request can cause, but
        InstanceLost."""

    def report(self, outputs: tuple[Output | Embedded, ...]) -> StepOutput:
        """What a step gave, with the load after it."""

    def check(self) -> None:
        """Raise `AssertionError` unless what is held is what is used. For idle moments."""

    def close(self) -> None:
        """End what it has started. Nothing may be asked afterwards."""
