"""Which of the parts that were built are really in use: each says so itself, by being called.

Requested is what the configuration says, effective what the plan took, invoked what this module
saw. A method that shows use (`ExtensionPoint.invoked`) is shadowed on the object until its first
call, which removes the shadow: later calls pay nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dovetail.plugin.extension_points import ExtensionPoint

_ABSENT = object()


class Attestation:
    """By key of the plan: True once it was invoked, False until then. A part that cannot be watched
    is not here."""

    def __init__(self) -> None:
        self.invoked: dict[str, bool] = {}
        self._watched: dict[str, tuple[ExtensionPoint, Any]] = {}
        self._shadows: dict[str, list[Callable[[], None]]] = {}

    def watch(self, key: str, extension_point: ExtensionPoint, built: Any) -> None:
        """From now on the first call of one of the extension point's methods counts."""
        self._lift(key)
        undo: list[Callable[[], None]] = []
        for name in extension_point.invoked:
            method = getattr(built, name, None)
            if method is None:
                continue
            # Not looked up in the object's dictionary: asking for that makes every later access to
            # the object slower.
            is_its_class = getattr(method, "__func__", None) is getattr(type(built), name, _ABSENT)
            before = _ABSENT if is_its_class else method
            try:
                setattr(built, name, self._shadow(key, method))
            except (AttributeError, TypeError):
                continue  # it takes no attributes
            undo.append(lambda name=name, before=before: _restore(built, name, before))  # type: ignore[misc]
        if undo:
            self.invoked[key] = False
            self._watched[key], self._shadows[key] = (extension_point, built), undo

    def begin_serving(self) -> None:
        """What was called while loading and warming up does not count for parts that work in every
        step."""
        for key, (extension_point, built) in list(self._watched.items()):
            if not extension_point.invoked_once:
                self.watch(key, extension_point, built)

    def _shadow(self, key: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def first(*args: Any, **kwargs: Any) -> Any:
            self._lift(key)
            self.invoked[key] = True
            return method(*args, **kwargs)

        return first

    def _lift(self, key: str) -> None:
        for undo in self._shadows.pop(key, []):
            undo()


def _restore(built: Any, name: str, before: Any) -> None:
    if before is _ABSENT:
        delattr(built, name)
    else:
        setattr(built, name, before)
