"""Create a package for an extension point that can be installed and passes its conformance test
unchanged.

A template is a folder of files in which `my_plugin`, `my-plugin` and `MyPlugin` stand for the new
name. The core's own templates are beside this file, one per extension point; a plugin that adds an
extension point names its own in `ExtensionPoint.scaffold`. `common/` has what is the same for all:
pyproject.toml and README.md.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import keyword
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from dovetail.errors import ConfigError
from dovetail.plugin.contracts import as_metadata
from dovetail.plugin.discovery import Registry
from dovetail.plugin.extension_points import ExtensionPoint

HERE = Path(__file__).parent


def new_plugin(registry: Registry, point_name: str, name: str, out: Path | None = None) -> Path:
    """Write the package into `out` (by default a folder with its name in the working directory),
    which must not exist. Returns the folder.

    Raises `ConfigError`; then nothing has been written.
    """
    extension_point = _extension_point(registry, point_name)
    module = _checked(registry, extension_point, name)
    target = Path(module) if out is None else out
    if target.exists():
        raise ConfigError(f"new-plugin: {target} already exists; choose another name, or --out")
    words = _words(registry, extension_point, module)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{module}-") as folder:
            package = Path(folder) / module
            for source in (HERE / "common", template_of(extension_point)):
                _copy(source, package, words)
            package.chmod(0o755)
            os.rename(package, target)  # atomic
    except OSError as e:
        raise ConfigError(f"new-plugin: cannot write {target}: {e.strerror}") from None
    return target


def template_of(extension_point: ExtensionPoint) -> Path:
    """Return the template folder of an extension point. Raises `ConfigError` if it has none."""
    if not extension_point.scaffold:
        folder = HERE / extension_point.name
    else:
        package, _, below = extension_point.scaffold.partition(":")
        spec = importlib.util.find_spec(package)
        folder = (
            Path(spec.origin).parent / below if spec is not None and spec.origin else Path(below)
        )
    if not folder.is_dir():
        raise ConfigError(
            f"new-plugin: the extension point {extension_point.name} has no template ({folder} is"
            " not a folder)"
        )
    return folder


def _extension_point(registry: Registry, name: str) -> ExtensionPoint:
    if name not in registry.extension_points:
        raise ConfigError(
            f"new-plugin: {name!r} is not an extension point; the extension points are"
            f" {', '.join(registry.extension_points)}"
        )
    return registry.extension_points[name]


def _checked(registry: Registry, extension_point: ExtensionPoint, name: str) -> str:
    """Return the name as a module name. Raises `ConfigError` if it is invalid or in use."""
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", module) or keyword.iskeyword(module):
        raise ConfigError(
            f"new-plugin: {name!r} is not a valid package name: use lower-case words, as in"
            " my_backend or my-backend"
        )
    dashed = module.replace("_", "-")
    installed = [
        d
        for d in importlib.metadata.distributions()
        if re.sub(r"[-_.]+", "-", d.name or "").lower() == dashed
    ]
    if installed:
        raise ConfigError(
            f"new-plugin: {installed[0].name} {installed[0].version} is already installed: choose"
            " another name"
        )
    if module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None:
        raise ConfigError(f"new-plugin: a module {module} already exists: choose another name")
    owners = [
        o.qualified_name for o in registry.of(extension_point.name) if o.provider.name == dashed
    ]
    if owners or dashed in ("auto", "none"):
        why = (
            f"a provider of {extension_point.name} ({', '.join(owners)})"
            if owners
            else "a keyword of engine configs"
        )
        raise ConfigError(f"new-plugin: {dashed!r} is {why}: choose another name")
    return module


def _words(registry: Registry, extension_point: ExtensionPoint, module: str) -> dict[str, str]:
    """Return the placeholders of the templates and their replacements; longer ones come first."""
    template = template_of(extension_point)
    owner = registry.added_by.get(extension_point.name)
    files = sorted(p for p in (template / "src/my_plugin").glob("*.py") if p.name != "__init__.py")
    rows = [f"| `src/my_plugin/{p.name}` | {_first_sentence(p)} |\n" for p in files]
    needs = [
        "dovetail-core",
        *([owner.distribution] if owner else []),
        *sorted(_libraries(template)),
    ]
    dashed = module.replace("_", "-")
    return {
        "THE_EXTENSION_POINT": extension_point.name,
        "THE_SUMMARY": extension_point.summary,
        "THE_VERSION": as_metadata(extension_point.contract),
        "THE_DEPENDENCIES": '", "'.join(needs),
        "THE_INTERFACE": interface_of(registry, extension_point),
        "THE_FILES": "".join(rows),
        "THE_USE": used_by(template),
        "MyPlugin": "".join(word.capitalize() for word in module.split("_")),
        "my_plugin": module,
        "my-plugin": dashed,
    }


def used_by(package: Path) -> str:
    """Return the command that uses a package: the comment in the first line of its engine.yaml."""
    return (package / "engine.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def interface_of(registry: Registry, extension_point: ExtensionPoint) -> str:
    """Return the module to read before writing a provider."""
    owner = registry.added_by.get(extension_point.name)
    if extension_point.interface is not None:
        return extension_point.interface.__module__
    return owner.module if owner else f"dovetail.interfaces.{extension_point.name}"


def _libraries(template: Path) -> set[str]:
    """Return the packages that the template's code imports besides Python's and Dovetail's."""
    found = set()
    for path in (template / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {m.split(".")[0] for m in modules}
    return {
        m
        for m in found - sys.stdlib_module_names
        if m != "my_plugin" and not m.startswith("dovetail")
    }


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"[.:;](?:\s|$)", " ".join(docstring.split()))[0]


def _copy(source: Path, target: Path, words: dict[str, str]) -> None:
    """Copy a folder's files with names and texts replaced; binary files are copied unchanged."""

    def renamed(text: str) -> str:
        for word, replacement in words.items():
            text = text.replace(word, replacement)
        return text

    for path in sorted(source.rglob("*")):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        to = target / renamed(str(path.relative_to(source)))
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            to.write_text(renamed(path.read_text(encoding="utf-8")), encoding="utf-8")
        except UnicodeDecodeError:
            shutil.copyfile(path, to)
