"""The fake has the signatures of FlashInfer, whose Python part `make test-real` installs."""

from __future__ import annotations

import inspect
import warnings

import fake_flashinfer
import pytest

from dovetail_attention_flashinfer import installed

USED = {
    "append_paged_kv_cache": [],
    "BatchDecodeWithPagedKVCacheWrapper": ["__init__", "plan", "run", "reset_workspace_buffer"],
    "BatchPrefillWithPagedKVCacheWrapper": ["__init__", "plan", "run", "reset_workspace_buffer"],
}


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.real
def test_the_fake_is_of_the_installed_version():
    assert installed("flashinfer-python") == fake_flashinfer.VERSION


@pytest.mark.real
@pytest.mark.parametrize("name", USED)
def test_signatures(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlashInfer warns if there is no GPU
        import flashinfer
    real, fake = getattr(flashinfer, name), getattr(fake_flashinfer, name)
    pairs = [(getattr(real, method), getattr(fake, method)) for method in USED[name]] or [
        (real, fake)
    ]
    assert [parameters(theirs) for theirs, _ in pairs] == [parameters(ours) for _, ours in pairs]
