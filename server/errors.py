"""What can go wrong on the way of a request, by name. Each knows its HTTP status and OpenAI fields.

Invariant: a message says what to change. Knows nothing of HTTP frameworks.
"""

from collections.abc import Iterable
from typing import ClassVar, Self


class ServerError(Exception):
    """Base: an error that a client of the REST API may see."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(ServerError):
    """The body is well-formed JSON but asks for something that is not possible."""

    status = 400
    kind = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and max_tokens do not fit into the model's context."""

    code = "context_length_exceeded"


class GrammarTooComplex(InvalidRequest):
    """The form that is asked for takes more time, memory or stack to compile than is granted."""

    code = "grammar_too_complex"


class UnknownModel(ServerError):
    """The request names a model that is not served here."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"

    @classmethod
    def among(cls, served: Iterable[str], name: str | None) -> Self:
        """For who names none of those that are `served`, or none at all."""
        names = ", ".join(map(repr, served))
        if name is None:
            return cls(f"Name one of the models that are served: {names}.", param="model")
        return cls(f"The model {name[:200]!r} isn't served here. Served is {names}.", param="model")


class UnsupportedMediaType(ServerError):
    """The body is not declared to be JSON."""

    status = 415
    kind = "invalid_request_error"


class BodyTooLarge(ServerError):
    """The body has more bytes, or more values, than any request that could be answered."""

    status = 413
    kind = "invalid_request_error"


class Overloaded(ServerError):
    """The queue is full: try again after `retry_after_s`."""

    status = 503
    kind = "overloaded_error"
    code = "overloaded"


class NotReady(ServerError):
    """No instance answers yet, or the server is draining."""

    status = 503
    kind = "overloaded_error"
    code = "not_ready"


class Asleep(NotReady):
    """The model was put to sleep; somebody has to wake it."""

    code = "asleep"


class DeadlineExceeded(ServerError):
    """The answer was not complete when the request's own deadline passed."""

    status = 504
    code = "deadline_exceeded"


class InstanceFailed(ServerError):
    """An instance could not finish the request, and neither could another."""

    status = 500
    code = "instance_failed"
