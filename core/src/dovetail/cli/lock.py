"""Implement `dovetail lock`, and `--locked` for the commands that run an engine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from dovetail.cli.run import progress_bars
from dovetail.composition.lock import check_lock, encode, make_lock
from dovetail.composition.resolution import resolve
from dovetail.plugin.config import EngineConfig, load_config
from dovetail.plugin.discovery import load_registry


def lock(config_file: str | None, values: dict[str, Any], out: str | None) -> int:
    """Write the lock of an engine config, atomically."""
    config = load_config(config_file, **values)
    path = (
        Path(out)
        if out
        else (Path(config_file).with_suffix(".lock") if config_file else Path("dovetail.lock"))
    )
    registry = load_registry()
    plan = resolve(config, registry, server=True)
    with progress_bars() as progress:
        text = encode(
            make_lock(
                plan, registry, lambda file, done, total: progress("hashing the model", done, total)
            )
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    print(f"{path}: plan {plan.fingerprint}, {len(plan.choices)} choices", file=sys.stderr)
    return 0


def check(config: EngineConfig, locked: str) -> None:
    """Raise `ConfigError`, listing every difference between the lock and the engine to run."""
    registry = load_registry()
    plan = resolve(config, registry, server=True)
    with progress_bars() as progress:
        check_lock(
            Path(locked),
            plan,
            registry,
            lambda file, done, total: progress("checking the lock", done, total),
        )
