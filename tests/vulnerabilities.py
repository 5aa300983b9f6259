"""Classes of vulnerability that inference engines have had, and the test that holds each here."""

from __future__ import annotations

SERVER = "plugins/server_openai/tests"
ATTACKS, VULNERABILITIES = f"{SERVER}/test_attacks.py", f"{SERVER}/test_vulnerabilities.py"
REFUSALS, LIFE = f"{SERVER}/test_refusals.py", f"{SERVER}/test_life.py"
FRONTEND, DETOKENIZER = "core/tests/test_frontend.py", "core/tests/test_detokenizer.py"
SOURCES, NATIVE = "tests/test_unsafe_code.py", "core/tests/test_native.py"

CLASSES: dict[str, str] = {
    # Code that runs.
    "pickle between processes (vLLM, CVE-2024-11041, CVE-2025-32444)": (
        f"{SOURCES}::test_no_source_runs_data_as_code"
    ),
    "an open port between processes (vLLM, CVE-2025-30202)": (
        f"{VULNERABILITIES}::test_the_engine_listens_on_no_port"
    ),
    "pickled weights (vLLM, CVE-2025-24357)": f"{SOURCES}::test_a_breach_is_found",
    "eval of what a model or a client wrote (vLLM, CVE-2025-9141)": (
        f"{SOURCES}::test_a_breach_is_found"
    ),
    "code that comes with a checkpoint (vLLM, CVE-2025-66448)": (
        "plugins/quantize/tests/test_model_folders.py::test_code_of_a_model_folder_is_not_run"
    ),
    "modules of the working directory": (
        f"{ATTACKS}::test_files_of_the_working_directory_do_not_run"
    ),
    "a template that reaches Python (llama-cpp-python, CVE-2024-34359)": (
        f"{FRONTEND}::test_chat_template_is_sandboxed"
    ),
    "tensors in requests (vLLM, CVE-2025-62164)": (
        f"{VULNERABILITIES}::test_tensors_of_clients_are_not_read"
    ),
    "planted kernels in a shared cache": (
        f"{NATIVE}::test_a_library_that_others_can_write_is_built_again"
    ),
    # Keys and secrets.
    "routes that forget the key": f"{ATTACKS}::test_every_route_but_these_needs_a_key",
    "keys compared byte by byte (vLLM, CVE-2025-59425)": (
        "tests/test_vulnerabilities.py::test_keys_are_compared_in_constant_time"
    ),
    "empty keys": f"{ATTACKS}::test_keys_that_protect_nothing_are_refused",
    "keys in processes' tables": (
        f"{ATTACKS}::test_a_key_from_the_environment_protects_and_goes_no_further"
    ),
    "keys in plans and logs": f"{REFUSALS}::test_the_key_is_told_nowhere",
    "upgrades that pass the guard": f"{VULNERABILITIES}::test_websockets_are_no_way_round_the_key",
    "pages of other origins": (
        f"{VULNERABILITIES}::test_pages_of_other_origins_may_not_read_answers"
    ),
    "tracebacks and paths in errors": f"{REFUSALS}::test_bad_bodies",
    "links to files outside the model": (
        f"{ATTACKS}::test_a_template_that_links_out_of_the_folder_is_not_read"
    ),
    "tokens in a model's files": f"{ATTACKS}::test_the_tokenizers_config_is_shown_in_part",
    "prompts in logs": f"{VULNERABILITIES}::test_prompts_and_answers_are_not_logged",
    "prompts found out by what is cached (vLLM, CVE-2025-46570)": (
        f"{ATTACKS}::test_each_key_has_a_prefix_cache_of_its_own"
    ),
    "addresses fetched for clients (vLLM, CVE-2025-6242)": (
        f"{VULNERABILITIES}::test_no_address_from_a_request_is_fetched"
    ),
    "paths in the names of models (Ollama, CVE-2024-37032)": (
        f"{VULNERABILITIES}::test_the_model_of_a_request_is_a_name_and_no_path"
    ),
    "control tokens in users' text": f"{ATTACKS}::test_users_cannot_write_control_tokens",
    "headers written by headers": f"{VULNERABILITIES}::test_a_request_id_cannot_write_headers",
    "smuggled requests": f"{VULNERABILITIES}::test_requests_cannot_be_smuggled",
    # What stops everybody.
    "heads without a limit (vLLM, CVE-2025-48956)": f"{ATTACKS}::test_a_head_has_a_limit",
    "slow heads": f"{ATTACKS}::test_a_head_that_never_ends_is_cut",
    "slow bodies": f"{ATTACKS}::test_a_body_that_does_not_come_is_not_waited_for",
    "silent connections": f"{ATTACKS}::test_silent_connections_keep_nobody_out",
    "large bodies": f"{REFUSALS}::test_bodies_that_are_too_large",
    "compressed bodies (Ollama, CVE-2024-12886)": (
        f"{VULNERABILITIES}::test_compressed_bodies_are_not_expanded"
    ),
    "nested bodies": f"{REFUSALS}::test_deep_bodies_never_break_the_server",
    "errors as long as their causes": (
        f"{REFUSALS}::test_a_list_of_a_million_bad_items_is_one_error"
    ),
    "empty prompts (vLLM, CVE-2024-8768)": f"{REFUSALS}::test_bad_bodies",
    "samples without a limit (vLLM, CVE-2024-8939)": (
        f"{REFUSALS}::test_bad_values_name_their_field"
    ),
    "log-probabilities without a limit": f"{ATTACKS}::test_the_size_of_an_answer_has_a_limit",
    "numbers that are none, or too large": (
        f"{ATTACKS}::test_numbers_beyond_float32_are_bad_requests"
    ),
    "token ids outside the vocabulary": f"{FRONTEND}::test_bad_prompts",
    "text that is no Unicode": f"{ATTACKS}::test_a_lone_surrogate_is_a_bad_request",
    "expressions and schemas (vLLM, CVE-2025-48942, CVE-2025-48943)": (
        f"{VULNERABILITIES}::test_expressions_and_schemas_of_clients_are_not_evaluated"
    ),
    "variables that replace a template's (vLLM, CVE-2025-61620)": (
        f"{REFUSALS}::test_template_variables_cannot_break_the_template"
    ),
    "long texts on the event loop (vLLM, CVE-2025-62426)": (
        f"{ATTACKS}::test_long_texts_do_not_hold_up_a_stream"
    ),
    "quadratic detokenizing": f"{DETOKENIZER}::test_the_window_stays_short",
    "clients that leave": f"{LIFE}::test_a_client_that_leaves_a_whole_answer_stops_the_work",
    "clients that do not read": f"{LIFE}::test_a_client_that_does_not_read_cannot_keep_it_alive",
    "queues without an end": f"{LIFE}::test_overload_is_told_and_loses_nothing",
    "hostile checkpoints": (
        "plugins/worker_torch/tests/test_checkpoint.py::test_what_is_wrong_is_said"
    ),
    "linked locks": f"{NATIVE}::test_a_linked_lock_empties_nothing",
}
"""By class, the test that would fail."""
