"""The compiled body by itself: where its cache lies, when it says that it compiles again, and what
it refuses."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dovetail.errors import ConfigError, PluginError
from dovetail_models_transformers import torch_compile
from dovetail_models_transformers.torch_compile import CompiledBody, check_compile

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def body(token_ids: Tensor, positions: Tensor) -> Tensor:
    """One layer of one head; the second half of it is there to be fused."""
    q = (token_ids + 2 * positions).float()[:, None, None].expand(-1, 1, 16).contiguous()
    out: Tensor = torch_compile.attend(0, q, q + 1, q * 2)
    return torch.sin(out).flatten(1) * 3


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    assert (k == q + 1).all()
    return (q + v).cumsum(0)


def check(run: CompiledBody, *lengths: int, dtype: torch.dtype = torch.int64) -> None:
    for length in lengths:
        token_ids, positions = torch.randint(100, (length,), dtype=dtype), torch.randperm(length)
        expected = torch.sin((token_ids + 2 * positions).float().cumsum(0) * 3) * 3
        with torch.inference_mode():
            hidden = run(token_ids, positions, attend)
        assert (hidden - expected[:, None].expand(-1, 16)).abs().max() < 1e-4


def test_compiles_for_one_token_and_for_several_and_says_when_it_must_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = CompiledBody(body, Path("a-model"))
    with caplog.at_level(logging.WARNING):
        check(run, 8, 1, 2, 65, 1, 3)
        assert not caplog.records
        check(run, 5, dtype=torch.int32)
        check(run, 1, 5, dtype=torch.int16)
    (record,) = caplog.records
    assert "a-model is compiled again, for a step of several tokens" in record.getMessage()


@pytest.mark.parametrize("given", ["nothing", "by the user"])
def test_the_cache_lies_where_the_user_keeps_caches(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(ours))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    if given == "by the user":
        monkeypatch.setenv(CACHE_VARIABLE, str(theirs))
    before = os.environ.get(CACHE_VARIABLE)
    factor = random.randrange(2, 10**6)  # a kernel that this process has not loaded yet

    def scaled(token_ids: Tensor, positions: Tensor) -> Tensor:
        return body(token_ids, positions) * factor / factor

    check(CompiledBody(scaled, Path("a-model")), 3)
    used, unused = (theirs, ours) if before else (ours / "dovetail" / "torch-compile", theirs)
    assert any(used.rglob("*.so"))
    assert not unused.exists()
    after = os.environ.get(CACHE_VARIABLE)
    assert after == before or (before is None and not str(after).startswith(str(tmp_path)))


def test_a_body_that_falls_apart_is_an_error() -> None:
    def broken(token_ids: Tensor, positions: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return body(token_ids, positions)

    with pytest.raises(
        PluginError,
        match=r"torch\.compile cannot compile a-model: .*graph_break.*\. Set it to plain",
    ):
        check(CompiledBody(broken, Path("a-model")), 3)


def test_errors_of_attention_pass_through() -> None:
    run = CompiledBody(body, Path("a-model"))
    check(run, 3)

    def fails(*_: object) -> Tensor:
        raise PluginError("no room", provider="some-attention")

    with pytest.raises(PluginError, match=r"^no room$"), torch.inference_mode():
        run(torch.arange(3), torch.arange(3), fails)
    check(run, 3)


def test_what_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compile("cpu")
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    with pytest.raises(
        ConfigError, match=r"^worker\.execution: .*Python's headers are not in /nowhere"
    ):
        check_compile("cpu")
    check_compile("cuda:0")


def test_a_cache_that_others_can_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    check_compile("cpu")
    shared = torch_compile.cache_folder()
    assert shared.stat().st_mode & 0o777 == 0o700
    shared.chmod(0o777)
    with pytest.raises(PluginError, match=r"is writable by all users .*set XDG_CACHE_HOME"):
        check_compile("cpu")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "theirs"))  # torch's affair, and the user's
    check_compile("cpu")
