"""Reading a quantization_config: every value is checked, and an error says where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dovetail.errors import CheckpointError

Config = Mapping[str, Any]


def refused(where: str, key: str, given: object, what: str) -> CheckpointError:
    """`where` is the file; `what` says what is expected."""
    return CheckpointError(f"{where}: quantization_config.{key} is {given!r}; {what}")


def one_of(
    where: str, config: Config, keys: Iterable[str], known: tuple[Any, ...], default: Any
) -> Any:
    """The value of the first key that is there, in lower case. Raises `CheckpointError` for one
    that is not known."""
    key = next((k for k in keys if config.get(k) is not None), None)
    given = default if key is None else config[key]
    value = given.lower() if isinstance(given, str) else given
    if value not in known or isinstance(value, bool):
        raise refused(where, str(key), given, f"this reads {' and '.join(map(repr, known))}")
    return value


def group_size(where: str, config: Config, keys: Iterable[str]) -> int | None:
    """Inputs that share a scale; None: all of them, which tools write as -1."""
    key = next((k for k in keys if k in config), None)
    given = 128 if key is None else config[key]
    if given in (-1, None):
        return None
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise refused(
            where, str(key), given, "it must be a number of inputs, or -1 for all of them"
        )
    return given
