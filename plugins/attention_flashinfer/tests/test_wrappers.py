"""FlashInfer's own Python code, which `make test-real` installs, accepts the plugin's arguments.
Its kernels are emulated in PyTorch."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import fake_flashinfer
import pytest
import torch
from test_flashinfer import FAKE

from dovetail_attention_flashinfer.backend import FlashInferAttention
from dovetail_testing.attention import AttentionContract

pytestmark = pytest.mark.real
NON_CAUSAL, CAUSAL, NHD = 0, 1, 0


class Unpinned:
    """torch without pinned memory, which needs a GPU."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, pin_memory=False, **how):
        return torch.empty(*size, **how)


def attend(
    planned, q, keys, values, starts, buffers, out, is_causal, window_left, soft_cap, sm_scale
):
    """Compute what the kernels compute, with the arithmetic of the fake."""
    indptr, indices, last = buffers
    player = fake_flashinfer.Wrapper(torch.empty(0, dtype=torch.uint8), "NHD")
    (
        player._paged_kv_indptr_buf,
        player._paged_kv_indices_buf,
        player._paged_kv_last_page_len_buf,
    ) = (
        indptr,
        indices,
        last,
    )
    assert isinstance(sm_scale, float)
    assert window_left == planned["window_left"]
    player._of = {
        **planned,
        "sm_scale": sm_scale,
        "logits_soft_cap": soft_cap,
        "q_data_type": q.dtype,
        "kv_data_type": keys.dtype,
    }
    player._run(q, (keys, values), starts, is_causal, q.shape[-1], None, None, out)


class Decode:
    """A fake of the module of kernels without tensor cores."""

    def plan(
        self,
        floats,
        integers,
        pinned,
        indptr,
        batch_size,
        num_heads,
        num_kv_heads,
        page_size,
        is_graph,
        window_left,
        soft_cap,
        size_qk,
        size_vo,
        like_q,
        like_kv,
    ):
        assert is_graph
        assert integers.shape == pinned.shape
        assert num_heads // num_kv_heads in fake_flashinfer.CORES_GROUPS
        assert len(indptr) == batch_size + 1
        sizes = {"num_qo_heads": num_heads, "num_kv_heads": num_kv_heads, "page_size": page_size}
        return {**sizes, "window_left": window_left}

    def run(
        self,
        floats,
        integers,
        planned,
        q,
        keys,
        values,
        indptr,
        indices,
        last,
        out,
        lse,
        layout,
        window_left,
        pdl,
        slopes,
        soft_cap,
        sm_scale,
        rope_scale,
        rope_theta,
    ):
        assert layout == NHD
        starts = list(range(len(last) + 1))
        attend(
            planned,
            q,
            keys,
            values,
            starts,
            (indptr, indices, last),
            out,
            False,
            window_left,
            soft_cap,
            sm_scale,
        )


class Prefill:
    """A fake of the module of kernels on tensor cores."""

    def plan(
        self,
        floats,
        integers,
        pinned,
        query_start,
        indptr,
        lens,
        num_rows,
        batch_size,
        num_heads,
        num_kv_heads,
        page_size,
        is_graph,
        size_qk,
        size_vo,
        is_causal,
        window_left,
        fixed_split,
        no_split,
        colocated,
    ):
        assert len(query_start) == len(indptr) == batch_size + 1
        assert int(query_start[-1]) == num_rows
        assert is_graph != is_causal
        sizes = {"num_qo_heads": num_heads, "num_kv_heads": num_kv_heads, "page_size": page_size}
        return {**sizes, "window_left": window_left}

    def paged_run(
        self,
        floats,
        integers,
        planned,
        q,
        keys,
        values,
        query_start,
        indptr,
        indices,
        last,
        out,
        lse,
        mask,
        layout,
        window_left,
        pdl,
        custom,
        mask_indptr,
        slopes,
        prefix,
        position,
        longest,
        soft_cap,
        sm_scale,
        *rest,
    ):
        assert layout == NHD
        assert mask in (NON_CAUSAL, CAUSAL)
        buffers, starts = (indptr, indices, last), query_start.tolist()
        attend(
            planned,
            q,
            keys,
            values,
            starts,
            buffers,
            out,
            mask == CAUSAL,
            window_left,
            soft_cap,
            sm_scale,
        )


def append(key, value, rows, positions, keys, values, indices, indptr, last, layout):
    assert layout == NHD
    fake_flashinfer.append_paged_kv_cache(
        key, value, rows, positions, (keys, values), indices, indptr, last
    )


def played(context, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlashInfer warns if there is no GPU
        import flashinfer
        from flashinfer import decode, page, prefill
    decode.torch = prefill.torch = Unpinned()
    decode.get_batch_decode_module = lambda *types: Decode()
    decode.get_batch_prefill_module = prefill.get_batch_prefill_module = lambda *types: Prefill()
    page.get_page_module = lambda: SimpleNamespace(append_paged_kv_cache=append)
    return FlashInferAttention("cpu", options, flashinfer, 256)


class TestWrappers(AttentionContract):
    provider = replace(FAKE, build=played)
    options = {"workspace_mb": 16}  # noqa: RUF012
