"""A fake FlashInfer 0.6.13 in PyTorch, with the functions that this plugin uses: it has the same
signatures, rejects the same arguments, and reads buffers at the same times.

As on a GPU, `plan` uses the numbers on the host, and `run` reads page tables and lengths from the
buffers. All slots of a row's pages up to its length are read, and multiplied even if the weight
is 0. `test_fake.py` compares the signatures with the real ones.
"""

from __future__ import annotations

import torch

VERSION = "0.6.13"
CORES_GROUPS = (1, 2, 3, 4, 8)
"""Group sizes of the decode kernels without tensor cores."""


def append_paged_kv_cache(
    append_key,
    append_value,
    batch_indices,
    positions,
    paged_kv_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
    kv_layout="NHD",
):
    assert kv_layout == "NHD"
    assert kv_last_page_len.shape[0] == kv_indptr.shape[0] - 1
    assert batch_indices.shape == positions.shape == append_key.shape[:1]
    page_size = paged_kv_cache[0].shape[1]
    places = kv_indptr[batch_indices.int()] * page_size + positions.int()
    pages, entries = kv_indices[places // page_size], places % page_size
    for own, new in zip(paged_kv_cache, (append_key, append_value), strict=True):
        assert new.dtype == own.dtype, "what is stored is copied bit by bit"
        assert new.stride(-1) == 1
        assert new.shape[1:] == own.shape[2:]
        own[pages, entries] = new


class Wrapper:
    """The common base class of both wrappers. `plan` stores its arguments in `_of`."""

    def __init__(self, float_workspace_buffer, kv_layout):
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        self._float_workspace_buffer = float_workspace_buffer
        self.device = float_workspace_buffer.device
        self._int_workspace_buffer = torch.empty(8 << 20, dtype=torch.uint8)

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        assert int_workspace_buffer.dtype == torch.uint8
        self._float_workspace_buffer, self._int_workspace_buffer = (
            float_workspace_buffer,
            int_workspace_buffer,
        )

    def _reserve(self, num_heads, num_rows, head_size):
        """Reserve `num_rows` partial results of each head, a vector and a logarithm in float32, as
        the planners do."""
        if num_heads * num_rows * (head_size + 1) * 4 > self._float_workspace_buffer.nbytes:
            raise RuntimeError(
                "Buffer overflow when allocating memory for tmp_v. Increase the workspace buffer"
                " size."
            )

    def _plan(self, given, indptr, indices, last_page_len):
        assert all(x.dtype == torch.int32 for x in (indptr, indices, last_page_len))
        assert indptr.device.type == last_page_len.device.type == "cpu", (
            "otherwise the host waits for the device"
        )
        assert len(indptr) == len(last_page_len) + 1
        assert int(indptr[-1]) == len(indices)
        assert bool((indptr[1:] > indptr[:-1]).all()), "a row without pages"
        assert bool(((last_page_len >= 1) & (last_page_len <= given["page_size"])).all())
        assert given["num_qo_heads"] % given["num_kv_heads"] == 0
        assert given["q_data_type"] in (torch.bfloat16, torch.float16)
        assert given["kv_data_type"] in (
            given["q_data_type"],
            torch.float8_e4m3fn,
        ), "q and KV have different 16-bit dtypes"
        self._of = given

    def _run(self, q, paged_kv_cache, starts, is_causal, head_size, k_scale, v_scale, out):
        """Attend. `starts` is [B + 1], the query starts of the rows."""
        of, (keys, values) = self._of, paged_kv_cache
        assert head_size in (64, 128, 256)
        assert q.dtype == out.dtype == of["q_data_type"]
        assert q.shape == out.shape == (starts[-1], of["num_qo_heads"], head_size)
        assert out.is_contiguous(), "its strides are not read"
        assert keys.dtype == values.dtype == of["kv_data_type"]
        assert keys.stride() == values.stride()
        assert tuple(keys.shape[2:]) == (of["num_kv_heads"], head_size)
        assert all(isinstance(x, float | None) for x in (k_scale, v_scale)), (
            "the kernel takes a number, not a tensor"
        )
        if keys.shape[1] != of["page_size"]:  # the kernel takes the size from the cache
            raise ValueError(f"pages of {keys.shape[1]}, planned for {of['page_size']}")
        indptr, last = self._paged_kv_indptr_buf.tolist(), self._paged_kv_last_page_len_buf.tolist()
        for b in range(len(last)):
            pages = self._paged_kv_indices_buf[indptr[b] : indptr[b + 1]].long()
            length = (len(pages) - 1) * of["page_size"] + last[b]
            k, v = (x[pages].flatten(0, 1)[:length].float() for x in (keys, values))
            begin, end = starts[b], starts[b + 1]
            out[begin:end] = self._attend(q[begin:end].float(), k, v, is_causal, k_scale or 1.0)
        if v_scale is not None and v_scale != 1.0:
            out *= v_scale
        return out

    def _attend(self, q, k, v, is_causal, k_scale):
        of, (num_queries, length) = self._of, (len(q), len(k))
        group = of["num_qo_heads"] // of["num_kv_heads"]
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scale = (q.shape[-1] ** -0.5 if of["sm_scale"] is None else of["sm_scale"]) * k_scale
        logits = q.transpose(0, 1) @ k.transpose(1, 2) * scale
        if cap := of["logits_soft_cap"] or 0.0:
            logits = cap * torch.tanh(logits / cap)
        query, key = torch.arange(num_queries)[:, None], torch.arange(length)
        sees = torch.ones(num_queries, length, dtype=torch.bool)
        if is_causal:
            sees &= key + num_queries <= length + query
        if of["window_left"] >= 0:
            sees &= key + num_queries + of["window_left"] >= length + query
        return (torch.softmax(logits.masked_fill(~sees, float("-inf")), -1) @ v).transpose(0, 1)


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
        jit_args=None,
    ):
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_cuda_graph, "this plugin creates decode wrappers in graph mode only"
        assert backend in ("auto", "fa2")
        assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
        self._use_tensor_cores = use_tensor_cores
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf = (
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
        )
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode="NONE",
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        data_type=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        non_blocking=True,
        block_tables=None,
        seq_lens=None,
        fixed_split_size=None,
        disable_split_kv=False,
        q_len_per_req=1,
    ):
        self._plan(dict(locals()), indptr, indices, last_page_len)
        group, num_rows = num_qo_heads // num_kv_heads, len(last_page_len)
        if self._use_tensor_cores:
            # Graph mode always splits contexts, here for a GPU with few multiprocessors.
            tile = 16 if group <= 16 else 64 if group <= 64 or head_dim >= 256 else 128
            self._reserve(
                num_qo_heads, (-(-num_rows * group // tile) + num_rows - 1) * tile, head_dim
            )
        if len(last_page_len) != len(self._paged_kv_last_page_len_buf):
            raise ValueError("The batch size should be fixed in cudagraph mode")
        if len(indices) > len(self._paged_kv_indices_buf):
            raise ValueError(
                "The size of indices should be less than or equal to the allocated buffer"
            )
        if not self._use_tensor_cores and num_qo_heads // num_kv_heads not in CORES_GROUPS:
            raise RuntimeError(f"Unsupported group_size: {num_qo_heads // num_kv_heads}")
        self._paged_kv_indptr_buf.copy_(indptr)
        self._paged_kv_last_page_len_buf.copy_(last_page_len)
        self._paged_kv_indices_buf[: len(indices)].copy_(indices)

    def run(
        self,
        q,
        paged_kv_cache,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        enable_pdl=None,
        window_left=None,
        sinks=None,
        q_len_per_req=None,
        skip_softmax_threshold_scale_factor=None,
        kv_cache_sf=None,
    ):
        starts = list(range(len(self._paged_kv_last_page_len_buf) + 1))
        return self._run(
            q, paged_kv_cache, starts, False, self._of["head_dim"], k_scale, v_scale, out
        )


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        custom_mask_buf=None,
        mask_indptr_buf=None,
        backend="auto",
        jit_args=None,
        jit_kwargs=None,
    ):
        super().__init__(float_workspace_buffer, kv_layout)
        assert not use_cuda_graph, "this plugin does not capture prefill"
        self.backend = backend

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        non_blocking=True,
        prefix_len_ptr=None,
        token_pos_in_items_ptr=None,
        token_pos_in_items_len=0,
        max_item_len_ptr=None,
        seq_lens=None,
        seq_lens_q=None,
        block_tables=None,
        max_token_per_sequence=None,
        max_sequence_kv=None,
        fixed_split_size=None,
        disable_split_kv=False,
    ):
        assert qo_indptr.device.type == "cpu"
        assert max_sequence_kv is None, "0.6.13 then has no lengths of its own"
        self._plan(dict(locals()), paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._qo_indptr_buf, self._paged_kv_indptr_buf = qo_indptr, paged_kv_indptr
        self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = (
            paged_kv_indices,
            paged_kv_last_page_len,
        )

    def run(
        self,
        q,
        paged_kv_cache,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        enable_pdl=None,
        window_left=None,
        sinks=None,
        kv_cache_sf=None,
        skip_softmax_threshold_scale_factor=None,
    ):
        starts, of = self._qo_indptr_buf.tolist(), self._of
        return self._run(
            q, paged_kv_cache, starts, of["causal"], of["head_dim_qk"], k_scale, v_scale, out
        )
