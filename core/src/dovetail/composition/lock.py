"""Write and check lock files, which record everything that determines what an engine computes.

A lock contains the plan's providers with their options and contract versions; version and file hash
of every distribution involved; the versions of their dependencies; a hash of every file of the
model; and the hardware. It contains no time, path or process id: the same engine config on the same
machine gives the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dovetail.errors import ConfigError
from dovetail.facts import DeviceFacts, device_facts
from dovetail.plan import DraftModel, Plan
from dovetail.plugin.discovery import PluginInfo, Registry

VERSION = 1
SKIPPED = re.compile(r"(^|/)(__pycache__|\.git)(/|$)|\.pyc$")
CHUNK = 1 << 22
Hashed = Callable[[str, int, int], None]
"""Progress callback: (file, bytes done, total bytes)."""


def make_lock(plan: Plan, registry: Registry, progress: Hashed = lambda *_: None) -> dict[str, Any]:
    """Build the lock of a resolved plan. Reads every file of the model once and calls
    `progress`."""
    used = {c.distribution for c in plan.choices.values() if not c.is_empty} | {"dovetail-core"}
    plugins = [p for p in registry.plugins if p.distribution in used]
    return {
        "lock": VERSION,
        "model": {
            "name": plan.model,
            "architecture": plan.architecture,
            "dtype": plan.dtype,
            "device": plan.device,
            "max_model_len": plan.max_model_len,
            "overlap": plan.overlap,
            "files": _model_files(Path(plan.folder), progress),
        },
        **({"draft": _draft(plan.draft, progress)} if plan.draft is not None else {}),
        "choices": {
            key: {
                "provider": c.provider,
                "distribution": c.distribution,
                "version": c.version,
                "contract": c.contract,
                "options": c.options,
                **({"match": c.match} if c.match else {}),
            }
            for key, c in plan.choices.items()
        },
        "distributions": {
            p.distribution: {"version": p.version, "sha256": _package_hash(p)} for p in plugins
        },
        "dependencies": _dependencies(used),
        "hardware": _hardware(device_facts()),
    }


def encode(lock: dict[str, Any]) -> str:
    return json.dumps(lock, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_lock(path: Path) -> dict[str, Any]:
    """Read a lock file. Raises `ConfigError`, which names the file."""
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read the lock {path}: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"{path} is not a lock file: {e}") from None
    if not isinstance(lock, dict) or lock.get("lock") != VERSION:
        raise ConfigError(
            f"{path} is not a lock of version {VERSION}; create it again with dovetail lock"
        )
    return lock


def drift(locked: Any, found: Any, where: str = "") -> list[str]:
    """List the differences from a lock, one line each: `where: locked → found`."""
    if isinstance(locked, dict) and isinstance(found, dict):
        lines: list[str] = []
        for key in [*locked, *(k for k in found if k not in locked)]:
            path = f"{where}.{key}" if where else str(key)
            if key not in found:
                lines.append(f"{path}: {_shown(locked[key])} → missing")
            elif key not in locked:
                lines.append(f"{path}: not locked → {_shown(found[key])}")
            else:
                lines += drift(locked[key], found[key], path)
        return lines
    if isinstance(locked, list) and isinstance(found, list):
        gone, new = [x for x in locked if x not in found], [x for x in found if x not in locked]
        parts = [f"missing: {', '.join(map(str, gone))}"] * bool(gone) + [
            f"new: {', '.join(map(str, new))}"
        ] * bool(new)
        return [f"{where}: {'; '.join(parts) or 'different order'}"] if locked != found else []
    return [] if locked == found else [f"{where}: {_shown(locked)} → {_shown(found)}"]


def check_lock(
    path: Path, plan: Plan, registry: Registry, progress: Hashed = lambda *_: None
) -> None:
    """Raise `ConfigError`, listing every difference, if the current state differs from a lock."""
    lines = drift(read_lock(path), json.loads(encode(make_lock(plan, registry, progress))))
    if lines:
        listing = "".join(f"\n  {line}" for line in lines)
        raise ConfigError(
            f"the engine differs from the lock {path} (locked → found):{listing}\nIf this is"
            " intended, run dovetail lock again"
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:100] + "…"


def _model_files(folder: Path, progress: Hashed) -> dict[str, str]:
    """Hash the files that a model is loaded from; others, such as a README, are ignored."""
    kinds = (".json", ".safetensors", ".jinja", ".model", ".py")
    files = sorted(p for p in folder.iterdir() if p.suffix in kinds and p.is_file())
    total, done = sum(p.stat().st_size for p in files), 0
    hashes = {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as f:
            while chunk := f.read(CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress(path.name, done, total)
        hashes[path.name] = digest.hexdigest()
    return hashes


def _draft(draft: DraftModel, progress: Hashed) -> dict[str, Any]:
    files = _model_files(Path(draft.folder), progress)
    return {"name": draft.model, "architecture": draft.architecture, "files": files}


def _package_hash(plugin: PluginInfo) -> str:
    """Hash the files of a plugin's package, independently of how and where it is installed. Imports
    nothing."""
    digest = hashlib.sha256()
    for name, path in sorted(_package_files(plugin.module.split(":")[0].split(".")[0])):
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _package_files(package: str) -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    for location in spec.submodule_search_locations or () if spec is not None else ():
        root = Path(location)
        for path in root.rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.is_file() and not SKIPPED.search(name):
                yield name, path
    if spec is not None and spec.origin and not spec.submodule_search_locations:
        yield Path(spec.origin).name, Path(spec.origin)


def _dependencies(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of the distributions' declared dependencies. Plugin distributions are
    listed elsewhere, with hashes."""
    names: set[str] = set()
    for name in distributions:
        for requirement in importlib.metadata.requires(name) or ():
            wanted = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
            if wanted and "extra ==" not in requirement:
                names.add(re.sub(r"[-_.]+", "-", wanted.group()).lower())
    return {
        name: version for name in sorted(names - set(distributions)) if (version := _version(name))
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware(facts: DeviceFacts) -> dict[str, Any]:
    return {
        "system": facts.system,
        "machine": facts.machine,
        "num_cores": facts.num_cores,
        "num_gpus": facts.num_gpus,
        "cpu_flags": sorted(facts.cpu_flags),
    }
