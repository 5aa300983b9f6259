"""Whether the configuration's rules, the checkpoint's quantization_config and its tensors agree."""

from __future__ import annotations

from collections.abc import Collection

from dovetail.errors import CheckpointError, ConfigError
from dovetail.facts import ModelFacts
from dovetail.interfaces.quantization import PLAIN
from dovetail.plan import Choice

PLAIN_TENSORS = frozenset({"weight", "bias"})


def stored_tensors(names: Collection[str]) -> dict[str, set[str]]:
    """By name of a layer, what a checkpoint holds of it, such as "weight" and "bias". `names` are
    of all its tensors."""
    found: dict[str, set[str]] = {}
    for name in names:
        layer, _, tensor = name.rpartition(".")
        found.setdefault(layer, set()).add(tensor)
    return found


def check_stored(
    model: ModelFacts,
    key: str,
    choice: Choice,
    name: str,
    found: set[str],
    wanted: Collection[str] | None,
) -> None:
    """Raise if a layer is stored otherwise than it is to be read. `found`: its tensors; `wanted`:
    those that a scheme reads, None for a plain weight."""
    if model.quantization_method == PLAIN or not found:
        return
    quantized, said = (
        f"{name} is stored quantized ({', '.join(sorted(found))})",
        model.quantization_said,
    )
    if wanted is None and not found <= PLAIN_TENSORS:
        if choice.requested != "auto":
            rule = f"{{match: {choice.match!r}, use: {choice.provider}}}"
            raise ConfigError(
                f"{key}: the rule {rule} and the checkpoint {model.folder} disagree: {quantized},"
                f" as {said} says. Remove the rule, or use a checkpoint that leaves the layer out"
            )
        raise CheckpointError(
            f"{model.folder}: {quantized}, and {said} leaves it out: is it the config that it was"
            " made with?"
        )
    if wanted is not None and found <= PLAIN_TENSORS and not found & {*wanted} - {"bias"}:
        raise CheckpointError(
            f"{model.folder}: {name} is stored as a plain weight, and {said} asks for"
            f" {', '.join(wanted)}: is it the config that it was made with?"
        )
