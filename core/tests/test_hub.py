"""What is asked of the hub, which a stand-in plays with the patterns' real meaning."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from dovetail.cli import main as cli
from dovetail.composition import hub
from dovetail.composition.models import find_model
from dovetail.composition.resolution import resolve
from dovetail.errors import ConfigError
from dovetail.plugin.config import load_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}
TWICE = {
    "consolidated.safetensors",
    "consolidated.safetensors.index.json",
    "consolidated-00001-of-00002.safetensors",
    "consolidated.00.pth",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/model.safetensors",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "model.gguf",
    "rust_model.ot",
    "checkpoint-500/model.safetensors",
    "metal/model.bin",
    "openvino/openvino_model.xml",
}
OTHERS = {"README.md", ".gitattributes", "assets/picture.png"}
CODE = {"modeling_mine.py"}


class Hub:
    """Repositories by id: their files, and commits by revision."""

    def __init__(self, cache: Path, model: Path) -> None:
        self.cache, self.model = cache, model
        self.files = NEEDED | TWICE | OTHERS | CODE
        self.revisions = {None: COMMIT, "main": COMMIT, "v1": OTHER, OTHER: OTHER}
        self.taken: set[str] = set()

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        if revision not in self.revisions:
            raise LookupError(f"404: no revision {revision}")
        self.taken = set(
            filter_repo_objects(
                self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        folder = (
            self.cache
            / f"models--{repo_id.replace('/', '--')}"
            / "snapshots"
            / self.revisions[revision]
        )
        if not folder.exists():
            shutil.copytree(self.model, folder)
        return str(folder)


@pytest.fixture
def there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub", model)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def test_the_stand_in_is_asked_as_the_hub_is() -> None:
    asked = inspect.signature(Hub.snapshot_download).parameters.keys() - {"self"}
    assert asked <= inspect.signature(huggingface_hub.snapshot_download).parameters.keys()


def test_nothing_comes_twice(there: Hub) -> None:
    find_model("somebody/something")
    assert there.taken == NEEDED


def test_code_comes_if_it_is_trusted(there: Hub) -> None:
    find_model("somebody/something", trust_remote_code=True)
    assert there.taken == NEEDED | CODE


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("v1", OTHER), (OTHER, OTHER)]
)
def test_the_plan_has_the_commit(
    revision: str | None, commit: str, there: Hub, simulated: Path
) -> None:
    plan = resolve(load_config(env={}, model="somebody/something", revision=revision))
    assert plan.revision == commit
    assert Path(plan.folder).name == commit


def test_two_commits_are_two_plans(there: Hub, simulated: Path) -> None:
    plans = [
        resolve(load_config(env={}, model="somebody/something", revision=r))
        for r in ("main", "v1", None)
    ]
    assert plans[0].fingerprint == plans[2].fingerprint != plans[1].fingerprint


def test_a_revision_that_is_not_there(there: Hub) -> None:
    with pytest.raises(
        ConfigError, match=r"'somebody/something' .* at revision 'nowhere': LookupError: 404"
    ):
        find_model("somebody/something", revision="nowhere")


def test_a_folder_has_no_revision(model: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^revision: 'v1' applies to models on the hub, but .* is a local path: remove it",
    ):
        find_model(str(model), revision="v1")
    assert find_model(str(model)).revision is None


def test_the_flag(there: Hub, simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--model", "somebody/something", "--revision", "v1"]) == 0
    assert OTHER in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "commit"),
    [
        ("hub/snapshots/" + COMMIT, COMMIT),
        ("snapshots/v1", None),
        ("models/" + COMMIT, None),
        ("snapshots/" + "x" * 40, None),
    ],
)
def test_commits_of_folders(folder: str, commit: str | None) -> None:
    assert hub.commit_of(Path(folder)) == commit
