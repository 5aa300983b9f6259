"""Read a quantization_config. Every value is checked, and an error names the file and the key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dovetail.errors import CheckpointError

Config = Mapping[str, Any]


def unsupported(where: str, key: str, value: object, what: str) -> CheckpointError:
    """Return the error for an unsupported value. `where` is the path of the file, and `what` says
    what is expected."""
    return CheckpointError(f"{where}: quantization_config.{key} is {value!r}; {what}")


def one_of(
    where: str, config: Config, keys: Iterable[str], known: tuple[Any, ...], default: Any
) -> Any:
    """Return the value of the first key that is present, in lower case. Raises `CheckpointError`
    for an unknown value."""
    key = next((k for k in keys if config.get(k) is not None), None)
    found = default if key is None else config[key]
    value = found.lower() if isinstance(found, str) else found
    if value not in known or isinstance(value, bool):
        raise unsupported(where, str(key), found, f"supported: {' and '.join(map(repr, known))}")
    return value


def group_size(where: str, config: Config, keys: Iterable[str]) -> int | None:
    """Return the number of inputs that share a scale. None means all, which tools write as -1."""
    key = next((k for k in keys if k in config), None)
    value = 128 if key is None else config[key]
    if value in (-1, None):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise unsupported(
            where, str(key), value, "it must be a number of inputs, or -1 for all of them"
        )
    return value
