"""What no source of ours may do: run code that comes as data, or that somebody else can put in its
way. By parsing alone."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

UNPICKLERS = frozenset(
    {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
)
SHELLS = frozenset(
    {
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "asyncio.create_subprocess_shell",
    }
)
YAML_LOADS = frozenset({"yaml.load", "yaml.load_all"})
YAML_UNSAFE = frozenset(
    {"yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"}
)
YAML_SAFE_LOADERS = frozenset({"yaml.SafeLoader", "yaml.CSafeLoader"})
TEMPLATES = frozenset(
    {
        "jinja2.Environment",
        "jinja2.environment.Environment",
        "jinja2.Template",
        "jinja2.environment.Template",
        "jinja2.nativetypes.NativeEnvironment",
        "jinja2.nativetypes.NativeTemplate",
    }
)
IMPORTS = frozenset({"importlib.import_module", "__import__", "builtins.__import__"})


@dataclass(frozen=True)
class Finding:
    """A line that breaks a rule, by the rule's name."""

    rule: str
    line: int
    text: str


def findings(source: str) -> list[Finding]:
    """Every breach in a module's source, in its order. Raises `SyntaxError`."""
    tree = ast.parse(source)
    names = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.func.is_called = True  # type: ignore[attr-defined]
    found = [
        Finding(rule, node.lineno, ast.unparse(node).splitlines()[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.expr | ast.stmt)
        for rule, breaks in RULES.items()
        if breaks(node, names)
    ]
    return sorted(found, key=lambda f: (f.line, f.rule))


def _imported(tree: ast.AST) -> dict[str, str]:
    """What local names stand for: {"np": "numpy", "load": "torch.load"}. Scopes are not told apart,
    which errs towards more."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update(
                {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            )
    return names


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The full name of `a.b.c`, with its first part as it was imported; empty for any other
    expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def _called(node: ast.AST, names: dict[str, str]) -> str:
    return _dotted(node.func, names) if isinstance(node, ast.Call) else ""


def _keyword(node: ast.AST, name: str) -> ast.expr | None:
    return (
        next((k.value for k in node.keywords if k.arg == name), None)
        if isinstance(node, ast.Call)
        else None
    )


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _modules(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    """Modules that a node imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.module or ""
    elif isinstance(node, ast.Call) and _called(node, names) in IMPORTS and node.args:
        yield str(getattr(node.args[0], "value", ""))


def _unpickles(node: ast.AST, names: dict[str, str]) -> bool:
    return any(module.split(".")[0] in UNPICKLERS for module in _modules(node, names))


def _evaluates(node: ast.AST, names: dict[str, str]) -> bool:
    # The builtin by its name: methods that are called so, such as model.eval() and re.compile(),
    # are attributes of something. Handed on, as in map(eval, texts), it counts too; only "compile"
    # is also a name that people give to things of their own.
    if isinstance(node, ast.Name | ast.Attribute) and _is_handed_on(node):
        return _dotted(node, names).removeprefix("builtins.") in {"eval", "exec"}
    return _called(node, names).removeprefix("builtins.") in {"eval", "exec", "compile"}


def _is_handed_on(node: ast.Name | ast.Attribute) -> bool:
    """A name that is read, and not to call it there: `findings` has marked those."""
    return isinstance(node.ctx, ast.Load) and not getattr(node, "is_called", False)


def _shell(node: ast.AST, names: dict[str, str]) -> bool:
    if isinstance(node, ast.Name | ast.Attribute) and _is_handed_on(node):
        return _dotted(node, names) in SHELLS
    given = _keyword(node, "shell")
    return _called(node, names) in SHELLS or (given is not None and not _is(given, False))


def _torch_load(node: ast.AST, names: dict[str, str]) -> bool:
    return _called(node, names) in {"torch.load", "torch.serialization.load"} and not _is(
        _keyword(node, "weights_only"), True
    )


def _yaml_load(node: ast.AST, names: dict[str, str]) -> bool:
    called = _called(node, names)
    if called not in YAML_LOADS or not isinstance(node, ast.Call):
        return called in YAML_UNSAFE
    loader = _keyword(node, "Loader") or (node.args[1] if len(node.args) > 1 else None)
    return loader is None or _dotted(loader, names) not in YAML_SAFE_LOADERS


def _allow_pickle(node: ast.AST, names: dict[str, str]) -> bool:
    given = _keyword(node, "allow_pickle")
    if isinstance(node, ast.Call) and _called(node, names) == "numpy.load" and len(node.args) > 2:
        given = node.args[2]
    return given is not None and not _is(given, False)


def _remote_code(node: ast.AST, names: dict[str, str]) -> bool:
    if isinstance(node, ast.Dict):
        return any(
            _is_text(k, "trust_remote_code") and _is(v, True)
            for k, v in zip(node.keys, node.values, strict=True)
        )
    return _is(_keyword(node, "trust_remote_code"), True)


def _is_text(node: ast.expr | None, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text


def _mktemp(node: ast.AST, names: dict[str, str]) -> bool:
    return _called(node, names) == "tempfile.mktemp"


def _template(node: ast.AST, names: dict[str, str]) -> bool:
    bases = [_dotted(base, names) for base in node.bases] if isinstance(node, ast.ClassDef) else []
    return not TEMPLATES.isdisjoint([_called(node, names), *bases])


RULES: dict[str, Callable[[ast.AST, dict[str, str]], bool]] = {
    "unpickling": _unpickles,
    "eval, exec, compile": _evaluates,
    "a shell": _shell,
    "torch.load without weights_only=True": _torch_load,
    "yaml without its safe loader": _yaml_load,
    "allow_pickle": _allow_pickle,
    "trust_remote_code=True": _remote_code,
    "tempfile.mktemp": _mktemp,
    "jinja2 without its sandbox": _template,
}
