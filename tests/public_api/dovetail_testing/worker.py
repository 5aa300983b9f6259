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

    @common_causes('the value of an option depends on the machine or the process', 'an option is not plain data')
    def test_the_plan_travels(self) -> None:
        ...

    @common_causes('a layer is missing in the groups, or is in two', 'the bytes of a block count only keys or only values')
    def test_life(self) -> None:
        ...

    @pytest.mark.parametrize('length', [1, 2, 15, 16, 17, 100])
    @common_causes('positions are off by one', 'the wrong half of a rotary pair is used', 'a row returns the logits of a token that is not its last')
    def test_greedy_is_the_references(self, length: int) -> None:
        ...

    @common_causes('log-probabilities are computed after temperature or penalties, not from raw logits', 'ranks are counted from 0')
    def test_logprobs_are_the_references(self) -> None:
        ...

    @pytest.mark.parametrize('chunk', [1, 5, 16, 31])
    @common_causes('positions start at 0 in each chunk', 'a row samples before its last token')
    def test_chunks_are_the_whole(self, chunk: int) -> None:
        ...

    @common_causes('rows read the logits, tables or positions of other rows', 'padding is treated as a row')
    def test_a_batch_is_each_alone(self) -> None:
        ...

    @common_causes('a batch index keeps tokens, penalties or tables of its previous sequence', 'a released sequence is still looked up')
    def test_preemption_changes_nothing(self) -> None:
        ...

    @common_causes('a batch index keeps the last token of its previous sequence')
    def test_an_id_may_be_used_again(self) -> None:
        ...

    @common_causes("the next step's input is read from the plan, which cannot contain it", 'results are returned out of order')
    def test_steps_in_flight(self) -> None:
        ...

    @common_causes('the rows of a step share a generator', 'noise is keyed by the row or the step instead of the position')
    def test_seeds(self) -> None:
        ...

    @common_causes('top-p or temperature is rounded in a narrow type', 'the noise never reaches the tails')
    def test_draws_follow_the_distribution(self) -> None:
        ...

    @common_causes('a parameter of one row is applied to all rows', 'min_tokens suppresses only one of several end-of-sequence tokens')
    def test_sampling_parameters(self) -> None:
        ...

    @common_causes('an exception is caught and replaced by a made-up token', 'a table is changed before the plan has been checked')
    def test_a_bad_step_is_an_error_and_no_more(self) -> None:
        ...

    @common_causes('the argmax of NaN logits is returned as a token')
    def test_nan_is_no_token(self) -> None:
        ...

    @pytest.mark.parametrize('damage', ['missing', 'truncated', 'renamed'])
    @common_causes('an error of the file library is not converted', 'tensors that are missing in the file keep random values')
    def test_a_damaged_checkpoint_is_named(self, damage: str) -> None:
        ...
