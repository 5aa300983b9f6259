"""Find the provider whose code failed or hangs, from an exception or from the stack of a thread.
Used only when something is wrong."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import NamedTuple

from dovetail.plan import SHADOW_PREFIX, Plan
from dovetail.plugin.discovery import Registry

CALLS = {"scheduler": ("kv_cache",), "worker": ("attention", "quantization", "architecture")}
"""The extension points whose providers a component calls, by component. Every other component calls
only itself and the extension points that it adds."""
ENGINE = "engine"
"""The component that calls all others."""


class Candidate(NamedTuple):
    """A provider that may be responsible for an error."""

    extension_point: str
    name: str
    """`dist:name`"""
    package: str
    """Package with its code; empty for a provider of the core, which is identified by module."""
    modules: set[str]
    """Modules in which it is implemented."""

    def __str__(self) -> str:
        return f"{self.extension_point} ({self.name})"


class Attribution:
    """Names the responsible provider in errors and log lines: "attention (dovetail-fast:fast)"."""

    def __init__(self, plan: Plan, registry: Registry, built: Mapping[str, object]) -> None:
        """Create an attribution. `built` has the providers' objects by plan key; it may grow."""
        self._plan, self._registry, self._built = plan, registry, built

    def __call__(self, error: BaseException, part: str) -> str:
        """Return the responsible provider. `part` is the component that was called; another one
        that it calls may be responsible. Without a provider, return `part`."""
        return (
            self.seen(error, part)
            or _only([s for s in self._candidates(part) if s.extension_point == part])
            or part
        )

    def seen(self, error: BaseException, part: str) -> str:
        """Return the responsible provider if the error itself shows it; otherwise an empty
        string."""
        candidates = self._candidates(part)
        named = getattr(error, "provider", None)
        of_name = [
            s for s in self._candidates(ENGINE) if named in (s.name, s.name.partition(":")[2])
        ]
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        return _only(of_name[:1] or _in_frames(reversed(frames), candidates))

    def of_module(self, module: str, part: str) -> str:
        """Return the provider that a module belongs to, or an empty string."""
        return _only(_owners(module, self._candidates(part)))

    def running(self) -> str:
        """Return the provider whose code a thread of this process is running now, or an empty
        string."""
        candidates = self._candidates(ENGINE)
        known = {t.ident: t for t in threading.enumerate()}
        found = []
        for ident, frame in sys._current_frames().items():
            if ident in known and ident != threading.get_ident():
                found += _in_frames(_outwards(frame), candidates)
        # The engine's thread may only wait for the worker's, in which another provider runs.
        found.sort(key=lambda s: s.extension_point == "worker")
        return str(found[0]) if found else ""

    def _candidates(self, part: str) -> list[Candidate]:
        candidates = []
        for key, choice in self._plan.choices.items():
            offers = [
                o
                for o in self._registry.of(choice.extension_point)
                if o.plugin.distribution == choice.distribution
            ]
            within = self._registry.extension_points[choice.extension_point].within
            if not (
                part in (ENGINE, choice.extension_point, within)
                or choice.extension_point in CALLS.get(part, ())
            ):
                continue
            for offer in (o for o in offers if o.provider.name == choice.provider):
                built = self._built.get(key)
                modules = {
                    getattr(built, "__module__", ""),
                    getattr(offer.provider.build, "__module__", ""),
                }
                package = offer.plugin.module.partition(".")[0]
                package = "" if package == "dovetail" else package
                extension_point = (
                    f"shadow {offer.extension_point}"
                    if key.startswith(SHADOW_PREFIX)
                    else offer.extension_point
                )
                candidates.append(
                    Candidate(extension_point, offer.qualified_name, package, modules)
                )
        return candidates


def _only(found: list[Candidate]) -> str:
    return str(found[0]) if len({s.name for s in found}) == 1 else ""


def _in_frames(frames: Iterable[FrameType], candidates: list[Candidate]) -> list[Candidate]:
    """Return the owners of the first frame that has any."""
    for frame in frames:
        if found := _owners(frame.f_globals.get("__name__", ""), candidates):
            return found
    return []


def _owners(module: str, candidates: list[Candidate]) -> list[Candidate]:
    """Return the provider that a module belongs to, if it is only one: a distribution may have
    several."""
    for matching in (
        [s for s in candidates if module in s.modules],
        [s for s in candidates if s.package and module.partition(".")[0] == s.package],
    ):
        if len({s.name for s in matching}) == 1:
            return matching[:1]
    return []


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
