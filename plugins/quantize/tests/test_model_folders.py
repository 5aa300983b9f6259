"""Test which files `dovetail quantize` reads and copies from a model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_quantizing import quantize


def test_the_files_are_as_readable_as_any_others(model: Path, tmp_path: Path) -> None:
    assert quantize(model, tmp_path / "out", "--scheme", "int8") == 0
    modes = {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_code_of_a_model_folder_is_not_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers must not ask on the terminal whether to run the code either."""
    folder, ran = shutil.copytree(model, tmp_path / "model"), tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.C"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", lambda *_: "y")
        assert quantize(folder, tmp_path / "out", "--scheme", "fp8") != 0
    assert not ran.exists()
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "tokenizer.json"])
def test_links_out_of_the_folder_are_not_followed(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret")
    assert quantize(folder, tmp_path / "out", "--scheme", "fp8") != 0
    assert f"{folder / name} is a link to {tmp_path / 'secret'}, outside the model" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub/models--somebody--something"
    snapshot, blobs, shared = (
        repository / "snapshots/abc",
        repository / "blobs",
        tmp_path / "hub/blobs/xx",
    )
    for new in (snapshot, blobs, shared):
        new.mkdir(parents=True)
    for i, file in enumerate(sorted(model.iterdir())):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (blobs / "0").rename(shared / "0")  # recent versions share one blob folder between repositories
    (blobs / "0").symlink_to("../../blobs/xx/0")
    (snapshot / "again.jinja").symlink_to("chat_template.jinja")
    assert quantize(snapshot, tmp_path / "out", "--scheme", "fp8") == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
