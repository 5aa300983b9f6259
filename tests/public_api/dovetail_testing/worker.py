from __future__ import annotations
import math
import random
from dataclasses import replace
from functools import partial
import pytest
from dovetail.errors import CheckpointError
from dovetail.interfaces.worker import Worker
from dovetail.plan import Plan
from dovetail.types import StepPlan, StepResult
from dovetail_testing.contract import common_causes
from dovetail_testing.tiny_model import LAYERS, softmax
from dovetail_testing.worker_drafts import DraftChecks
from dovetail_testing.worker_driver import EOS, GREEDY, Driver
from dovetail_testing.worker_tiers import TierChecks
from dovetail_testing.worker_trial import BLOCK_SIZE, SEATS, Asked, error_of, no_progress, replace_params, temperature_for
from dovetail_testing.worker_weights import WeightChecks
MARGIN = 0.0001
NUM_DRAWS = 160000
CRITICAL = 5.5

def run_step(worker: Worker, plan: StepPlan) -> StepResult:
    ...

class WorkerContract(TierChecks, DraftChecks, WeightChecks):
    extension_point = 'worker'

    @common_causes('an option whose value depends on the machine or the process', 'an option that is no plain data')
    def test_the_plan_travels(self) -> None:
        ...

    @common_causes('a layer left out of the groups, or in two', 'bytes of a block counted for keys or values alone')
    def test_life(self) -> None:
        ...

    @pytest.mark.parametrize('length', [1, 2, 15, 16, 17, 100])
    @common_causes('positions off by one', 'the wrong half of a rotary pair', "the logits of another token than a row's last")
    def test_greedy_is_the_references(self, length: int) -> None:
        ...

    @common_causes('log-probabilities after temperature or penalties: the raw ones are asked for', 'the rank counted from 0')
    def test_logprobs_are_the_references(self) -> None:
        ...

    @pytest.mark.parametrize('chunk', [1, 5, 16, 31])
    @common_causes('positions that begin at 0 with each chunk', 'a row that samples before its last token')
    def test_chunks_are_the_whole(self, chunk: int) -> None:
        ...

    @common_causes("rows that read each other's logits, tables or positions", 'padding that is taken for a row')
    def test_a_batch_is_each_alone(self) -> None:
        ...

    @common_causes('tokens, penalties or tables of a batch row kept from before', 'a released sequence that is still looked up')
    def test_preemption_changes_nothing(self) -> None:
        ...

    @common_causes("a batch row's last token kept for the next sequence that sits there")
    def test_an_id_may_be_used_again(self) -> None:
        ...

    @common_causes("the next step's input taken from the plan, which cannot know it", 'results returned out of order')
    def test_steps_in_flight(self) -> None:
        ...

    @common_causes('a generator shared by the rows of a step', 'noise keyed by the row or the step instead of the position')
    def test_seeds(self) -> None:
        ...

    @common_causes('top-p or temperature rounded in a narrow type', 'noise that never reaches the tails')
    def test_draws_follow_the_distribution(self) -> None:
        ...

    @common_causes('a parameter of one row applied to all rows', 'min_tokens that holds back one end token of several')
    def test_sampling_parameters(self) -> None:
        ...

    @common_causes('an exception caught and answered with a made-up token', 'a table changed before the plan was looked at')
    def test_a_bad_step_is_an_error_and_no_more(self) -> None:
        ...

    @common_causes('NaN logits whose argmax is taken all the same')
    def test_nan_is_no_token(self) -> None:
        ...

    @pytest.mark.parametrize('damage', ['missing', 'truncated', 'renamed'])
    @common_causes('an error of the file library passed on as it is', 'tensors left at random where the file has none')
    def test_a_damaged_checkpoint_is_named(self, damage: str) -> None:
        ...
