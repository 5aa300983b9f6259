"""Record which of the providers' objects are really used, by observing the first call of each.

A plan records the requested and the effective provider; this module adds whether it was invoked. A
method of the object (one of `ExtensionPoint.invoked`) is replaced by a wrapper until its first
call, which removes the wrapper: later calls have no overhead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dovetail.plugin.extension_points import ExtensionPoint

_ABSENT = object()


class Attestation:
    """Invocation state of the providers: whether each has been invoked, by plan key. A provider
    that cannot be observed is missing."""

    def __init__(self) -> None:
        self.invoked: dict[str, bool] = {}
        self._watched: dict[str, tuple[ExtensionPoint, Any]] = {}
        self._wrappers: dict[str, list[Callable[[], None]]] = {}

    def watch(self, key: str, extension_point: ExtensionPoint, built: Any) -> None:
        """Observe the first call of one of the extension point's methods from now on."""
        self._unwrap(key)
        undo: list[Callable[[], None]] = []
        for name in extension_point.invoked:
            method = getattr(built, name, None)
            if method is None:
                continue
            # The object's __dict__ is not used: reading it makes every later attribute access
            # slower.
            is_its_class = getattr(method, "__func__", None) is getattr(type(built), name, _ABSENT)
            before = _ABSENT if is_its_class else method
            try:
                setattr(built, name, self._wrap(key, method))
            except (AttributeError, TypeError):
                continue  # its attributes cannot be set
            undo.append(lambda name=name, before=before: _restore(built, name, before))  # type: ignore[misc]
        if undo:
            self.invoked[key] = False
            self._watched[key], self._wrappers[key] = (extension_point, built), undo

    def begin_serving(self) -> None:
        """Reset providers that run in every step: calls during loading and warm-up do not count."""
        for key, (extension_point, built) in list(self._watched.items()):
            if not extension_point.invoked_once:
                self.watch(key, extension_point, built)

    def _wrap(self, key: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def first(*args: Any, **kwargs: Any) -> Any:
            self._unwrap(key)
            self.invoked[key] = True
            return method(*args, **kwargs)

        return first

    def _unwrap(self, key: str) -> None:
        for undo in self._wrappers.pop(key, []):
            undo()


def _restore(built: Any, name: str, before: Any) -> None:
    if before is _ABSENT:
        delattr(built, name)
    else:
        setattr(built, name, before)
