"""The command line's options of what can be set, made of the settings themselves.

Owns what only a command line knows of a setting: its name where that differs, how a size is
written, which variable stands for it. Invariant: name, bounds, default and meaning of an option are
those of its field, so that nothing is said twice and a new field is an option at once.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import typer

from allocator import parse_bytes
from server.settings import Settings
from workers import KERNELS_VARIABLE, EngineSettings, checked

Options = Mapping[str, Any]
"""What was given on the command line, by the settings' names."""

_NAMES: Final = {
    "num_instances": "--instances",
    "allowed_hosts": "--allowed-host",
    "drain_timeout_s": "--drain-timeout",
    "hang_timeout_s": "--hang-timeout",
}
"""Of those that are not called as their fields are."""
_SIZES: Final = ("memory_limit", "attention_workspace", "device_memory")
_VARIABLES: Final = {"cpu_kernels": KERNELS_VARIABLE}
_WHAT: Final = {"allowed_hosts": "NAME"}


def option(name: str) -> str:
    """A setting as it is called on the command line."""
    return _NAMES.get(name, f"--{name.replace('_', '-')}")


@dataclass(frozen=True)
class _Setting:
    """What a field says of itself."""

    name: str
    kind: Any
    default: Any
    least: float | None
    most: float | None
    help: str | None


def takes_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of these settings, or of all; it gets their values as `options`,
    an `Options`, in whose place they stand."""
    chosen = {one.name: one for one in _SETTINGS if not names or one.name in names}

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in chosen}
            command(options=options, **given)

        parameters = []
        for one in inspect.signature(command).parameters.values():
            if one.name == "options":
                parameters += [_parameter(setting) for setting in chosen.values()]
            else:
                parameters.append(one)
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        )
        return run

    return decorated


def settings(options: Options, **known: Any) -> Settings:
    """All settings: those of the command line, and what is `known` without it. Raises
    InvalidSetting, ValidationError, AllocatorError."""
    values = {name: value for name, value in _read(options).items() if value is not None}
    of_engine = {name: values.pop(name) for name in _ENGINE if name in values}
    return Settings(**known, **values, engine=checked(of_engine))


def engine_settings(options: Options) -> EngineSettings:
    """The engine's part of it. Raises as `settings` does."""
    return checked({name: value for name, value in _read(options).items() if name in _ENGINE})


def _read(options: Options) -> dict[str, Any]:
    """Sizes as bytes."""
    return {
        name: parse_bytes(value) if name in _SIZES and value is not None else value
        for name, value in options.items()
    }


def _parameter(setting: _Setting) -> inspect.Parameter:
    """As the command line takes it."""
    kind, default, least, most = setting.kind, setting.default, setting.least, setting.most
    if setting.name in _SIZES:  # judged once it is read
        kind, least, most = str | None, None, None
        default = None if default is None else f"{default >> 20}MiB"
    elif get_origin(kind) is Literal:
        kind = str  # what it may be, the settings say
    elif get_origin(kind) is tuple:
        kind, default = list[str] | None, None
    name = option(setting.name)
    # What is off unless it is asked for needs no name for its opposite.
    declared = f"{name}/--no-{name[2:]}" if setting.default is True else name
    told = typer.Option(
        declared,
        help=setting.help,
        envvar=_VARIABLES.get(setting.name),
        metavar=_WHAT.get(setting.name),
        min=least,
        max=most,
    )
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, told],
    )


def _of_server() -> list[_Setting]:
    found = []
    for name, field in Settings.model_fields.items():
        if field.description is None:
            continue
        least = next((one.ge for one in field.metadata if hasattr(one, "ge")), None)
        most = next((one.le for one in field.metadata if hasattr(one, "le")), None)
        kind = field.annotation
        found.append(_Setting(name, kind, field.default, least, most, field.description))
    return found


def _of_engine() -> list[_Setting]:
    found = []
    hints = get_type_hints(EngineSettings, include_extras=True)
    for field in msgspec.structs.fields(EngineSettings):
        hint = hints[field.name]
        optional = get_origin(hint) in (Union, UnionType)
        kind, meta = get_args(get_args(hint)[0] if optional else hint)
        found.append(
            _Setting(
                field.name,
                kind | None if optional else kind,
                field.default,
                meta.ge,
                meta.le,
                meta.description,
            )
        )
    return found


_ENGINE: Final = frozenset(EngineSettings.__struct_fields__)
_SETTINGS: Final = (*_of_server(), *_of_engine())
