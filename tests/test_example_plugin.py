"""The example plugin, installed and used as a stranger would: a wheel, no configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples/attention_sdpa"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, as pip would lay them out."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=EXAMPLE, check=True, capture_output=True)
    site = out / "site"
    zipfile.ZipFile(next(out.glob("*.whl"))).extractall(site)
    return site


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=200, cwd=site)


def test_it_is_found_chosen_and_gives_the_same_text(site: Path) -> None:
    cli = ("-m", "dovetail.cli.main")
    assert "sdpa" in run(site, *cli, "plugins").stdout
    plan = json.loads(run(site, *cli, "explain", "--attention", "sdpa", "--json").stdout)
    assert plan["choices"]["attention.full"]["distribution"] == "dovetail-attention-sdpa"
    texts = set()
    for name in ("sdpa", "torch-reference"):
        out = run(site, *cli, "generate", "import os", "--max-tokens", "12", "--dtype", "float32", "--attention", name)
        assert out.returncode == 0, out.stderr
        texts.add(out.stdout)
    assert len(texts) == 1


def test_it_passes_the_conformance_kit(site: Path) -> None:
    out = run(site, "-m", "pytest", "-p", "no:cacheprovider", str(EXAMPLE / "tests"), "--rootdir", str(site))
    assert out.returncode == 0, out.stdout[-3000:]
    assert " passed" in out.stdout
