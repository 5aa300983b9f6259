"""Implement `dovetail new-plugin`: create a package for an extension point."""

from __future__ import annotations

from pathlib import Path

from dovetail.plugin.discovery import load_registry
from dovetail_testing.scaffold import new_plugin, used_by


def write(extension_point: str, name: str, out: str | None) -> int:
    """Write the package, list its files and print the next three commands."""
    folder = new_plugin(load_registry(), extension_point, name, None if out is None else Path(out))
    dashed = name.replace("_", "-")
    print(f"{folder}: a package with provider {dashed!r} for extension point {extension_point}")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        print(f"  {path.relative_to(folder)}")
    print("\nNext:")
    print(f"  pip install -e {folder}")
    print(f"  dovetail conform {dashed}")
    print(f"  {used_by(folder).replace('engine.yaml', str(folder / 'engine.yaml'))}")
    return 0
