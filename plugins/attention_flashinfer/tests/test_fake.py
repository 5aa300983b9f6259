"""The stand-in has FlashInfer's signatures, where FlashInfer is installed."""

from __future__ import annotations

import inspect
import warnings

import fake_flashinfer
import pytest

USED = {
    "append_paged_kv_cache": [],
    "BatchDecodeWithPagedKVCacheWrapper": ["__init__", "plan", "run", "reset_workspace_buffer"],
    "BatchPrefillWithPagedKVCacheWrapper": ["__init__", "plan", "run", "reset_workspace_buffer"],
}


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.skipif(bool(fake_flashinfer.WHY_NOT_REAL), reason=fake_flashinfer.WHY_NOT_REAL or "")
@pytest.mark.parametrize("name", USED)
def test_signatures(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, where there is no GPU
        import flashinfer
    real, fake = getattr(flashinfer, name), getattr(fake_flashinfer, name)
    pairs = [(getattr(real, method), getattr(fake, method)) for method in USED[name]] or [(real, fake)]
    assert [parameters(theirs) for theirs, _ in pairs] == [parameters(ours) for _, ours in pairs]
