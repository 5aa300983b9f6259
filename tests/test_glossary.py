"""Words that were replaced by the field's terms do not come back: DESIGN, "Vocabulary"."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".md", ".cpp", ".h", ".cu", ".toml", ".yaml"}
NOT_READ = ("CHANGELOG.md", "benchmarks/results/", "tests/public_api/", "tests/test_glossary.py")

GLOSSARY = {
    r"[Ss]ockets?": "extension point",
    r"SocketConfig|SOCKETS": "ProviderConfig, EXTENSION_POINTS",
    r"drawn|drew": "sampled",
    r"[Dd]rawing": "sampler backend",
    r"seats?": "batch index",
    r"rungs?|ladders?": "capture sizes",
    r"take_news|News": "outputs",
    r"culprits?|suspects?": "responsible provider, candidates",
    r"undeclared": "unsupported",
    r"strangers?|stranger's|strangers'": "third party",
    r"neighbou?rs": "other choices, other rows",
    r"composition files?": "engine config",
    r"made_by": "providers",
    r"multiplied_by": "gemm_backend",
    r"perturb_?": "add_gumbel_noise",
    r"whatever_happens\w*": "block_accounting_invariant_holds",
    r"no folder here": "not a local path",
    r"nobody to take them": "no provider is selected",
    r"left no choice": "excluded because it conflicts with",
    r"the books": "bookkeeping",
    r"one door": "registered the same way",
}
"""What may not come back, as a pattern for whole words, and the term to use instead."""
NETWORK = re.compile(
    r"^\s*import socket|^\s*from socket|import os, socket|socketpair|socket pair|raw socket"
    r"|[Ww]ebSocket|[Uu]nix socket|listening socket|network socket|sockets=",
    re.MULTILINE,
)
"""Files in which a socket is a network socket."""


def texts() -> dict[str, str]:
    """The text of every tracked source and page, by its path."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [n for n in listed.stdout.splitlines() if Path(n).suffix in SUFFIXES]
    return {
        n: (ROOT / n).read_text(encoding="utf-8")
        for n in names
        if not n.startswith(NOT_READ) and (ROOT / n).is_file()
    }


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return texts()


@pytest.mark.parametrize("word", GLOSSARY)
def test_a_replaced_word_does_not_come_back(word: str, sources: dict[str, str]) -> None:
    pattern = re.compile(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])")
    found = []
    for name, text in sources.items():
        if "ocket" in word and NETWORK.search(text):
            continue
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{name}:{line}: {match[0]!r}, which is {GLOSSARY[word]!r}")
    assert not found, "\n".join(found)


def test_a_word_is_found(sources: dict[str, str]) -> None:
    assert len(sources) > 400
    planted = sources | {"planted.py": "# a token is drawn from a stranger's socket"}
    for word in (r"drawn|drew", r"[Ss]ockets?", r"strangers?|stranger's|strangers'"):
        with pytest.raises(AssertionError, match=r"planted\.py:1"):
            test_a_replaced_word_does_not_come_back(word, planted)
