"""The `dovetail` command as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.cli.main import main

DOVETAIL = [sys.executable, "-m", "dovetail.cli.main"]


def run(*args: str, input: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DOVETAIL, *args],
        capture_output=True,
        text=True,
        input=input,
        timeout=120,
        env={**os.environ, **env},
    )


def test_plugins_lists_every_offer() -> None:
    out = run("plugins")
    assert out.returncode == 0, out.stderr
    for name in ("torch-reference", "attention-cpu", "openai", "demo", "fcfs", "paged"):
        assert name in out.stdout
    data = json.loads(run("plugins", "--json").stdout)
    assert {"core", "worker-torch", "attention-cpu", "server-openai", "demo-model"} <= {
        p["name"] for p in data
    }


def test_explain_says_what_and_why(tmp_path: Path) -> None:
    out = run("explain")
    assert out.returncode == 0, out.stderr
    assert re.search(r"attention\.full +attention-cpu", out.stdout)
    why = r"\[priority\] priority 0; attention-cpu has \d+ +→ set attention\.full:"
    said = r"not torch-reference +dovetail-worker-torch\n.*" + why
    assert re.search(said, out.stdout), out.stdout
    config = tmp_path / "engine.yaml"
    config.write_text("attention: torch-reference\nscheduler: {use: priority, max_num_seqs: 7}\n")
    plan = json.loads(
        run("explain", str(config), "--json", "--max-num-batched-tokens", "99").stdout
    )
    assert plan["choices"]["attention.full"]["provider"] == "torch-reference"
    assert plan["choices"]["scheduler"]["options"] == {
        "max_num_seqs": 7,
        "max_num_batched_tokens": 99,
    }
    assert len(plan["fingerprint"]) == 16


def test_without_a_compiler_auto_takes_the_reference_and_says_so() -> None:
    out = run("explain", PATH=str(Path(sys.executable).parent), CXX="no-such-compiler")
    assert re.search(r"attention\.full +torch-reference", out.stdout), out.stdout + out.stderr
    assert re.search(
        r"not attention-cpu .*\n.*\[unusable\] no C\+\+ compiler .*→ install", out.stdout
    ), out.stdout
    asked = run(
        "explain",
        "--attention",
        "attention-cpu",
        PATH=str(Path(sys.executable).parent),
        CXX="no-such-compiler",
    )
    assert asked.returncode == 2
    assert "compiler" in asked.stderr


def test_generate_streams_text() -> None:
    out = run("generate", "import os", "--max-tokens", "5")
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("import os")
    assert len(out.stdout) > len("import os\n")
    assert "loading weights: done" in out.stderr


def test_chat_keeps_the_conversation() -> None:
    out = run("chat", "--max-tokens", "8", input="What is os.path?\nAnd sys?\n\n")
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("> ") == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explain", "--attention", "atention-cpu"], "Did you mean 'attention-cpu'?"),
        (["explain", "absent.yaml"], "cannot read absent.yaml"),
        (["explain", "--max-model-len", "999999"], "exceeds the model's context"),
        (["explain", "--block-size", "0"], "kv_cache.block_size"),
        (["explain", "--device", "cuda:7"], "this machine has"),
        (["explain", "--tensor-parallel-size", "2"], "use 1"),
        (["generate", "hi", "--model", "no-such-model"], "neither a model"),
        (["generate", "hi", "--temperature", "nan"], "temperature must be finite"),
        (["generate", "hi", "--kv-cache-memory-gb", "0.000001"], "lower max_model_len to"),
        (["serve", "--port", "1", "--host", "256.1.1.1"], "cannot listen"),
        (["bench", "serve", "--url", "http://127.0.0.1:9", "--rounds", "1"], "no server at"),
    ],
)
def test_mistakes_are_one_line_and_say_what_to_do(args: list[str], message: str) -> None:
    out = run(*args)
    assert out.returncode == 2, out.stdout + out.stderr
    assert message in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_bench_prints_and_writes_figures(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    args = ["--input-len", "8", "--output-len", "4", "--rounds", "2", "--json", str(path)]
    out = run(
        "bench", kind, "demo", *args, *(["--num-requests", "3"] if kind == "throughput" else [])
    )
    assert out.returncode == 0, out.stderr
    assert "tokens/s" in out.stdout
    assert len(json.loads(path.read_text())["points"][0]["rounds"]) == 2


def test_bench_serve_sweeps_a_running_server(tmp_path: Path) -> None:
    path, plots = tmp_path / "out.json", tmp_path / "plots"
    with subprocess.Popen(
        [*DOVETAIL, "serve", "demo", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            url = next(
                m.group(1) for line in server.stdout if (m := re.search(r"Ready: (\S+)", line))
            )
            sizes = [
                "--input-len",
                "8",
                "--output-len",
                "4",
                "--rounds",
                "2",
                "--concurrency",
                "1,2",
            ]
            out = run(
                "bench", "serve", "--url", url, *sizes, "--json", str(path), "--plot", str(plots)
            )
        finally:
            server.terminate()
    assert out.returncode == 0, out.stderr
    assert "requests/s" in out.stdout
    data = json.loads(path.read_text())
    assert data["model"] == "demo"
    assert re.fullmatch(r"[0-9a-f]{16}", data["plan"]["fingerprint"])
    assert [(p["concurrency"], p["num_requests"], len(p["rounds"])) for p in data["points"]] == [
        (1, 4, 2),
        (2, 8, 2),
    ]
    assert sorted(p.name for p in plots.iterdir()) == ["serve.html", "serve.png"]


def test_a_hub_id_goes_to_the_hub(tmp_path: Path) -> None:
    """The hub's own cache layout, without a network: a model that is there is used, one that is not
    is an error."""
    import shutil

    from dovetail_demo_model import WEIGHTS

    commit = "0" * 40
    repo = tmp_path / "hub/models--somebody--demo"
    shutil.copytree(WEIGHTS, repo / "snapshots" / commit, ignore=shutil.ignore_patterns("draft"))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    out = run("generate", "import os", "--model", "somebody/demo", "--max-tokens", "2", **env)
    assert out.returncode == 0, out.stderr
    out = run("generate", "hi", "--model", "somebody/else", **env)
    assert out.returncode == 2
    assert "the download from the hub failed" in out.stderr


def test_conform_on_a_device_that_is_not_declared(capsys):
    assert main(["conform", "dovetail-attention-cuda"]) == 1
    assert (
        "it supports cuda, but the device is cpu: select another with --device"
        in capsys.readouterr().out
    )
