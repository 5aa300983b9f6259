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

    @common_causes('a field of AttentionCapabilities left empty')
    def test_declaration(self) -> None:
        ...

    @common_causes('`why_not` refuses what the capabilities promise', 'a size or type declared that was never tried')
    def test_what_is_declared_is_taken(self) -> None:
        ...

    @common_causes('a capability declared by mistake', 'head_sizes or block_sizes left at None, which means any')
    def test_what_is_not_declared_is_refused(self) -> None:
        ...

    @common_causes('`out` ignored', 'new arrays returned in place of `out`')
    def test_export_fills_what_it_is_given(self) -> None:
        ...

    @pytest.mark.parametrize('index', range(NUM_RANDOM_STEPS))
    @common_causes('block table or slots indexed by the wrong stride', 'the mask of a chunk, whose first query is not at 0')
    def test_random_step(self, index: int) -> None:
        ...

    @common_causes('a size assumed to be a power of two', 'sums kept in the storage type instead of float32')
    def test_every_declared_size_and_type(self) -> None:
        ...

    @pytest.mark.parametrize('group', [1, 2, 5, 8, 16])
    @common_causes('head h mapped to KV head h % Hkv; it is h // (Hq / Hkv)', 'a group size that does not fill a tile')
    def test_query_heads_share_kv_heads(self, group: int) -> None:
        ...

    @common_causes('split softmax merged without rescaling by the maxima', 'sums kept in a type narrower than float32')
    def test_long_context_of_few_rows(self) -> None:
        ...

    @common_causes('a grid or workspace sized for fewer rows')
    def test_many_rows(self) -> None:
        ...

    @common_causes('an empty loop over earlier blocks', "slots of the last block behind the sequence's end were read")
    def test_single_token(self) -> None:
        ...

    @pytest.mark.parametrize('window', [1, 2, 16, 17, 100, 10000])
    @common_causes('off by one: a token sees itself and window - 1 before it', 'table entries before the window were followed')
    def test_sliding_window(self, window: int) -> None:
        ...

    @pytest.mark.parametrize('cap', [1.0, 30.0])
    @common_causes('the cap applied before the scale', 'the cap applied after masking, which makes -inf finite')
    def test_logit_soft_cap(self, cap: float) -> None:
        ...

    @common_causes('the sink left out of the sum, or counted once for each split', 'the sink scaled or capped: it is a logit as is')
    def test_sinks(self) -> None:
        ...

    @common_causes("exp without subtracting the row's maximum", 'weights kept in float16, whose largest number is 65504')
    def test_large_logits(self) -> None:
        ...

    @pytest.mark.parametrize('largest', [(0.5, 4.0), (6.0, 0.25)])
    @common_causes("the keys' scale used for values", 'codes not limited before they are cast', 'a scale for each head')
    def test_scales_of_keys_and_values(self, largest: tuple[float, float]) -> None:
        ...

    @pytest.mark.parametrize('index', range(6))
    @common_causes('padding rows or tokens written to block 0', 'a whole block written where the step has part of it')
    def test_only_the_steps_slots_are_written(self, index: int) -> None:
        ...

    @common_causes('0 · NaN is NaN: masked weights still multiply what they should not touch', "reads up to the block's end")
    def test_nothing_behind_a_sequence_is_read(self) -> None:
        ...

    @common_causes("each row's keys written when its turn comes, instead of all before any is read")
    def test_rows_of_a_step_share_blocks(self) -> None:
        ...

    @common_causes('a table, its lengths or its splits kept from the step before', "a plan looked up by a buffer's address")
    def test_buffers_are_reused_between_steps(self) -> None:
        ...

    @common_causes("the plan kept in the backend, and overwritten by another group's")
    def test_two_plans_live_side_by_side(self) -> None:
        ...

    @common_causes("scale, soft cap or sinks taken from the plan's first layer")
    def test_one_plan_serves_all_layers(self) -> None:
        ...

    @common_causes('sums by atomic additions, in the order that threads arrive', 'memory that is read before it is written')
    def test_deterministic(self) -> None:
        ...

    @pytest.mark.parametrize('index', range(6))
    @common_causes('the number of splits follows the batch', 'a matrix product whose order of summation follows its shape')
    def test_batch_invariance(self, index: int) -> None:
        ...

    @pytest.mark.parametrize('index', range(8))
    @common_causes('pieces that depend on the order of pieces', 'the strides of AttentionCall taken for contiguous ones')
    def test_compiled_steps_do_what_run_does(self, index: int) -> None:
        ...

    @pytest.mark.parametrize('index', range(6))
    @common_causes("lengths, splits or a grid taken from the host's numbers", 'buffers made anew by each `plan`')
    def test_an_old_plan_does_the_new_step(self, index: int) -> None:
        ...

    @common_causes("the own layout's order of heads and slots left in what is exported", 'blocks sorted before they are copied')
    def test_export_and_import(self) -> None:
        ...
