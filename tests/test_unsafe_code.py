"""No source of ours unpickles, evaluates or calls a shell: DESIGN, "Security". Exceptions are
named, with their reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from unsafe_code import RULES, findings

ROOT = Path(__file__).parents[1]
FOLDERS = ("core", "kit", "plugins", "examples", "benchmarks", "docs", "tests")
NOT_OURS = frozenset({"build", "dist", "site-packages", "node_modules", "__pycache__"})
ALLOWED: dict[tuple[str, str], str] = {
    (
        "tests/test_docs.py",
        "eval, exec, compile",
    ): "checks the syntax of the docs' examples, and runs nothing",
    (
        "core/tests/test_hub.py",
        "trust_remote_code=True",
    ): "asks a stand-in for the hub what would be downloaded",
}
"""(file, rule) -> why it may."""


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [
        ROOT / "conftest.py",
        *(p for p in found if NOT_OURS.isdisjoint(p.relative_to(ROOT).parts)),
    ]


def test_no_source_runs_data_as_code() -> None:
    found = {}
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        for finding in findings(path.read_text(encoding="utf-8")):
            found.setdefault((name, finding.rule), []).append(
                f"{name}:{finding.line}: {finding.rule}: {finding.text}"
            )
    refused = [line for key, lines in found.items() if key not in ALLOWED for line in lines]
    assert not refused, "\n".join(
        ["find another way, or name the exception and its reason in ALLOWED:", *refused]
    )
    assert ALLOWED.keys() <= found.keys(), f"no longer needed: {ALLOWED.keys() - found.keys()}"


def test_all_folders_are_looked_through() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in sources()}
    assert names >= set(FOLDERS)
    assert len(sources()) > 400


BREACHES: dict[str, tuple[str, ...]] = {
    "unpickling": (
        "import pickle",
        "import cPickle as p",
        "from pickle import loads",
        "import marshal",
        "import os, shelve",
        "from dill import load",
        "def f():\n    import cloudpickle",
        "import joblib.numpy_pickle",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('marshal')",
    ),
    "eval, exec, compile": (
        "eval('1')",
        "exec(text)",
        "compile(text, 'f', 'exec')",
        "import builtins\nbuiltins.eval(text)",
        "from builtins import exec as run\nrun(text)",
        "list(map(eval, texts))",
        "import builtins\nrun = builtins.exec",
    ),
    "a shell": (
        "import os\nos.system('ls')",
        "from os import system as s\ns('ls')",
        "import os\nos.popen('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "from subprocess import Popen\nPopen('ls', shell=flag)",
        "import subprocess as sp\nsp.getoutput('ls')",
        "import asyncio\nasyncio.create_subprocess_shell('ls')",
        "import os\nlist(map(os.system, commands))",
    ),
    "torch.load without weights_only=True": (
        "import torch\ntorch.load('f')",
        "import torch as t\nt.load('f', weights_only=False)",
        "from torch import load\nload('f', weights_only=flag)",
        "import torch.serialization\ntorch.serialization.load('f')",
    ),
    "yaml without its safe loader": (
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "import yaml\nyaml.load_all(text, Loader=yaml.FullLoader)",
        "from yaml import load\nload(text, Loader=mine)",
        "import yaml\nyaml.full_load(text)",
    ),
    "allow_pickle": (
        "import numpy as np\nnp.load('f', allow_pickle=True)",
        "from numpy import load\nload('f', allow_pickle=flag)",
        "import numpy as np\nnp.load('f', None, True)",
        "import numpy\nnumpy.lib.format.read_array(f, allow_pickle=True)",
    ),
    "trust_remote_code=True": (
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "options = dict(trust_remote_code=True)",
    ),
    "tempfile.mktemp": (
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp as m\nm('.so')",
    ),
    "jinja2 without its sandbox": (
        "import jinja2\njinja2.Environment()",
        "from jinja2 import Template\nTemplate(text)",
        "from jinja2 import Environment as E\nE(trim_blocks=True)",
        "from jinja2.nativetypes import NativeEnvironment\nNativeEnvironment()",
        "import jinja2\nclass E(jinja2.Environment): ...",
    ),
}


@pytest.mark.parametrize(
    ("rule", "source"), [(rule, source) for rule in RULES for source in BREACHES[rule]]
)
def test_a_breach_is_found(
    rule: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finding,) = findings(source)
    assert finding.rule == rule
    assert finding.line == source.count("\n") + 1
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "conftest.py").write_text("")
    (tmp_path / "benchmarks" / "planted.py").write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=rf"benchmarks/planted\.py:{finding.line}: "):
        test_no_source_runs_data_as_code()


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "import torch\ntorch.compile(model)",
        "self.exec()",
        "import torch\ntorch.load('f', weights_only=True)",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.CSafeLoader)",
        "import numpy as np\nnp.load('f')",
        "import numpy as np\nnp.load('f', allow_pickle=False)",
        "AutoModel.from_pretrained(f, trust_remote_code=False)",
        "tmp_path_factory.mktemp('x')",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "from jinja2.sandbox import ImmutableSandboxedEnvironment\nImmutableSandboxedEnvironment()",
        "from jinja2.sandbox import SandboxedEnvironment\nclass E(SandboxedEnvironment): ...",
        "exec = 1",
        "self.eval = x.eval",
        "from somewhere import Environment\nEnvironment()",
        "import importlib\nimportlib.import_module('json')",
        "import triton.language as tl\ntl.load(x)",
        "from .pickle import x",
        "def compile(self): ...",
    ],
)
def test_what_is_sound_is_left_alone(source: str) -> None:
    assert findings(source) == []
