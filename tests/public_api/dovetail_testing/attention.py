from __future__ import annotations
import itertools
import random
from dataclasses import replace
from functools import partial
import pytest
from dovetail.plugin.provider import Context
from dovetail_testing.attention_steps import LARGEST, Row, Step, StepSpec, block_sizes, head_sizes, padded, plain, random_spec, simpler
from dovetail_testing.attention_trial import AttentionTrial, same
from dovetail_testing.contract import common_causes
NUM_RANDOM_STEPS = 40
HOST_FIELDS = ('host_query_start', 'host_seq_lens', 'num_seqs', 'num_tokens', 'max_query_len', 'max_seq_len')

class AttentionContract(AttentionTrial):
    extension_point = 'attention'

    @common_causes('a field of AttentionCapabilities is empty')
    def test_declaration(self) -> None:
        ...

    @common_causes('`why_not` rejects what the capabilities declare', 'a size or type is declared but was never tested')
    def test_what_is_declared_is_taken(self) -> None:
        ...

    @common_causes('a capability is declared by mistake', 'head_sizes or block_sizes is None, which means any')
    def test_what_is_not_declared_is_refused(self) -> None:
        ...

    @common_causes('`out` is ignored', 'new arrays are returned instead of `out`')
    def test_export_fills_what_it_is_given(self) -> None:
        ...

    @pytest.mark.parametrize('index', range(NUM_RANDOM_STEPS))
    @common_causes('the block table or the slots are indexed with the wrong stride', 'the mask is wrong for a chunk whose first query is not at position 0')
    def test_random_step(self, index: int) -> None:
        ...

    @common_causes('a size is assumed to be a power of two', 'sums are kept in the storage type instead of float32')
    def test_every_declared_size_and_type(self) -> None:
        ...

    @pytest.mark.parametrize('group', [1, 2, 5, 8, 16])
    @common_causes('head h is mapped to KV head h % Hkv instead of h // (Hq / Hkv)', 'a group size does not fill a tile')
    def test_query_heads_share_kv_heads(self, group: int) -> None:
        ...

    @common_causes('split softmax is merged without rescaling by the maxima', 'sums are kept in a type narrower than float32')
    def test_long_context_of_few_rows(self) -> None:
        ...

    @common_causes('a grid or workspace is sized for fewer rows')
    def test_many_rows(self) -> None:
        ...

    @common_causes('a loop over earlier blocks is empty', "slots of the last block behind the sequence's end are read")
    def test_single_token(self) -> None:
        ...

    @pytest.mark.parametrize('window', [1, 2, 16, 17, 100, 10000])
    @common_causes('off by one: a token attends to itself and to window - 1 tokens before it', 'table entries before the window are followed')
    def test_sliding_window(self, window: int) -> None:
        ...

    @pytest.mark.parametrize('cap', [1.0, 30.0])
    @common_causes('the cap is applied before the scale', 'the cap is applied after masking, which makes -inf finite')
    def test_logit_soft_cap(self, cap: float) -> None:
        ...

    @common_causes('the sink is left out of the sum, or counted once per split', 'the sink is scaled or capped, although it is already a logit')
    def test_sinks(self) -> None:
        ...

    @common_causes("exp is computed without subtracting the row's maximum", 'weights are kept in float16, whose largest number is 65504')
    def test_large_logits(self) -> None:
        ...

    @pytest.mark.parametrize('largest', [(0.5, 4.0), (6.0, 0.25)])
    @common_causes("the keys' scale is used for values", 'values are not clamped before they are cast', 'each head has its own scale')
    def test_scales_of_keys_and_values(self, largest: tuple[float, float]) -> None:
        ...

    @pytest.mark.parametrize('index', range(6))
    @common_causes('padding rows or tokens are written to block 0', 'a whole block is written where the step has only part of it')
    def test_only_the_steps_slots_are_written(self, index: int) -> None:
        ...

    @common_causes('0 · NaN is NaN: masked weights are multiplied with values that must not be read', "reads continue up to the block's end")
    def test_nothing_behind_a_sequence_is_read(self) -> None:
        ...

    @common_causes('the keys of a row are written when it is computed, not before any row is read')
    def test_rows_of_a_step_share_blocks(self) -> None:
        ...

    @common_causes('a table, its lengths or its splits are those of the previous step', 'a plan is looked up by the address of a buffer')
    def test_buffers_are_reused_between_steps(self) -> None:
        ...

    @common_causes('the plan is stored in the backend and overwritten by that of another group')
    def test_two_plans_live_side_by_side(self) -> None:
        ...

    @common_causes("scale, soft cap or sinks are those of the plan's first layer")
    def test_one_plan_serves_all_layers(self) -> None:
        ...

    @common_causes('sums use atomic additions in the order in which threads arrive', 'memory is read before it is written')
    def test_deterministic(self) -> None:
        ...

    @pytest.mark.parametrize('index', range(6))
    @common_causes('the number of splits depends on the batch', 'the order of summation in a GEMM depends on its shape')
    def test_batch_invariance(self, index: int) -> None:
        ...

    @pytest.mark.parametrize('index', range(8))
    @common_causes('results depend on the order of pieces', 'the strides in AttentionCall are assumed to be contiguous')
    def test_compiled_steps_do_what_run_does(self, index: int) -> None:
        ...

    @pytest.mark.parametrize('index', range(6))
    @common_causes('lengths, splits or a grid depend on the numbers on the host', 'each `plan` allocates new buffers')
    def test_an_old_plan_does_the_new_step(self, index: int) -> None:
        ...

    @common_causes("exported KV has the order of heads and slots of the provider's own layout", 'blocks are sorted before they are copied')
    def test_export_and_import(self) -> None:
        ...
