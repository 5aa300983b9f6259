"""The example plugin, installed and used as a stranger would: a wheel, no configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from strangers import conform, run, site_of

NAME = "attention_sdpa"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_of(NAME, tmp_path_factory.mktemp("wheel"))


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
    conform(NAME, site)
