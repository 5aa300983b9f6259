"""What `make test` leaves to `make test-real` because it takes long: a slice of each stays."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import settings

# Machines are busy and slow: how long an example takes is no property of the code.
settings.register_profile("dovetail", deadline=None)
settings.load_profile("dovetail")

LONG = (
    # Wheels of the examples in fresh environments: all are built and found, and one is run.
    *(
        f"tests/test_examples.py::test_{what}?{name}]"
        for what in ("it_conforms", "an_engine_composed_by_a_file_runs_with_it")
        for name in (
            "architecture_gpt2",
            "attention_numpy",
            "attention_sdpa",
            "drafter_copycat",
            "eviction_clock",
            "quant_nf4",
            "scheduler_srf",
        )
    ),
    "tests/test_guide.py::test_the_guide_is_carried_out",
    "tests/test_new_plugin.py::test_their_own_tests_pass",
    "tests/test_new_plugin.py::test_they_are_documented_typed_and_tidy",
    "tests/test_example_architecture.py::test_it_passes_the_conformance_kit",
    "tests/test_example_quantization.py::test_it_passes_the_conformance_kit",
    "tests/test_draft_model.py::test_wrong_bookkeeping_is_noticed?[!u]*",
    "tests/test_draft_model.py::test_wrong_bookkeeping_is_noticed?update ]",
    "tests/test_draft_model.py::test_a_model_that_drafts_for_itself_is_always_right*, *",
    "tests/test_new_plugin.py::test_conform_and_explain_name_them",
    "tests/test_torch_compile.py::test_output_is_the_same_when_compiled?g[!p]*",
    "tests/test_torch_compile.py::test_output_is_the_same_when_compiled?gpt-oss*",
    "plugins/models_torch/tests/test_models.py::test_bridged_through_torch_compile_is_the_same*",
    "tests/test_exactness.py::test_greedy_equals_transformers?gpt-oss*torch-reference]",
    "tests/test_host_tier.py::test_the_same_tokens_from_either_tier*torch-reference]",
    # The hang of one component in the engine and of the worker stay.
    *(
        f"tests/test_chaos.py::test_what_hangs_or_crashes_costs_the_process?{name}-hang]"
        for name in ("eviction", "kv_cache", "prefix_cache", "speculation")
    ),
    "tests/test_pallas.py::test_greedy_tokens_are_those_of_the_reference*",
    "tests/test_quantized_memory.py::test_it_takes_what_the_format_promises*",
    # JAX compiles for seconds, and Triton's interpreter is slow: a few random steps stay, and what
    # is no contract.
    "plugins/attention_pallas/tests/test_attention_pallas.py::TestPallas::test_[!r]*",
    "plugins/attention_pallas/tests/test_attention_pallas.py::TestPallas::test_random_step?[!0-3]]",
    "plugins/attention_pallas/tests/test_attention_pallas.py::TestPallas::test_random_step??*[0-9]]",
    "plugins/attention_cuda/tests/test_triton.py::TestTriton::test_every_declared_size_and_type",
    "plugins/attention_cuda/tests/test_triton.py::TestTriton::test_an_old_plan_does_the_new_step?[!0]]",
    "plugins/attention_cuda/tests/test_triton.py::TestTriton::test_sliding_window?[!0]]",
    "plugins/attention_cuda/tests/test_cuda.py::test_nvcc_compiles_them*",
    "plugins/attention_cuda/tests/test_cuda.py::test_contexts_are_split_where_rows_are_few*",
    # One size, one mode or one phase of each stays.
    "plugins/worker_torch/tests/test_device_runner.py::test_the_fake_device_sees_what_is_not_on_it?[!s]*",
    "plugins/worker_torch/tests/test_device_runner.py::test_the_cache_gets_what_graphs_leave",
    "plugins/worker_torch/tests/test_device_runner.py::test_a_capture_that_takes_more_than_was_reserved_is_reported",
    "plugins/worker_torch/tests/test_device_runner.py::TestWorker::test_scales_of_the_kv_cache",
    "plugins/worker_torch/tests/test_device_runner.py::TestWorker::test_a_model_drafts_for_itself",
    "plugins/worker_torch/tests/test_device_runner.py::TestWorker::test_drafts_change_no_output?[!r]*",
    "plugins/worker_torch/tests/test_device_runner.py::TestWorker::test_blocks_go_to_the_host_and_come_back*",
    "plugins/worker_torch/tests/test_device_runner.py::TestWorker::test_a_quantized_checkpoint",
    "plugins/worker_torch/tests/test_conformance.py::TestTorchWorker::test_a_quantized_checkpoint",
    "plugins/worker_torch/tests/test_random_weights.py::test_a_config_is_enough?int8]",
    "plugins/matmul_cuda/tests/test_triton.py::TestTriton::test_products_are_those_of_the_dequantized_weight",
    "plugins/matmul_cuda/tests/test_triton.py::TestTriton::test_rounded_inputs",
    "plugins/attention_cuda/tests/test_triton.py::TestTriton::test_random_step?[!0-2]]",
    "plugins/attention_cuda/tests/test_triton.py::TestTriton::test_only_the_steps_slots_are_written?[!0]]",
    "plugins/attention_cuda/tests/test_cuda.py::TestCuda::test_random_step?[!0-2]]",
    "plugins/attention_cuda/tests/test_cuda.py::TestCuda::test_only_the_steps_slots_are_written?[!0]]",
    "plugins/attention_cuda/tests/test_cuda.py::TestCuda::test_sliding_window?[!0]]",
    "tests/test_quantized_checkpoints.py::test_gptq?plain-*",
    "tests/test_quantized_checkpoints.py::test_compressed_tensors?plain-*",
    "tests/test_draft_model.py::test_it_catches_up_after_rests_and_preemption?[!t]*",
    "tests/test_examples.py::test_it_is_found?[!ar]*",
    "tests/test_gpu_check.py::test_first",
    "tests/test_new_plugin.py::test_engines_run_with_them",
    "plugins/worker_torch/tests/test_conformance.py::TestTorchWorkerCompiled::test_draws_follow_the_distribution",
    "plugins/worker_torch/tests/test_conformance.py::TestTorchWorker::test_draws_follow_the_distribution",
)
"""Patterns of test ids."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(fnmatchcase(item.nodeid, pattern) for pattern in LONG):
            item.add_marker(pytest.mark.real)
