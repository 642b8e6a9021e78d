"""What tests share: which of them are slow, and small models made once.

`make quick` leaves out what is marked slow. The slow ones are listed here, in one place, because
what is slow is a matter of measurement (`pytest --durations=30`), not of a test's meaning.
"""

import contextlib
import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):  # before anything imports the standard library's
    import setuptools  # noqa: F401     # distutils: PyTorch's compiler insists on setuptools' own

ROOT = Path(__file__).parents[1]

# a shell that runs tests in the background ignores these for them, and for all that they start
for number, usual in ((signal.SIGINT, signal.default_int_handler),
                      (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

SLOW = {  # file -> its tests that take seconds: processes, compilers, a model of 135M parameters
    "test_distill": {
        "test_a_stopped_stage_goes_on_as_if_nothing_had_happened",
        "test_two_ranks_train_what_one_trains",
    },
    "test_peft": {
        "test_a_stopped_stage_goes_on_and_leaves_a_plain_model_and_an_adapter",
        "test_two_ranks_train_the_adapter_that_one_trains",
    },
    "test_docs": {
        "test_every_notebook_and_every_module_has_a_page",
        "test_pages_of_the_site",
        "test_solutions_are_closed_on_the_site",
    },
    "test_preference_stages": {
        "test_two_ranks_train_what_one_trains",
    },
    "test_distributed": {
        "test_the_same_run_as_alone_at_unequal_target_counts",
        "test_tensor_parallel_with_biases_and_learned_positions",
        "test_a_run_goes_on_at_another_number_of_processes",
        "test_a_batch_that_does_not_divide_is_refused_before_anything_is_written",
    },
    "test_expert_parallel": {
        "test_a_run_goes_on_at_another_number_of_ranks",
        "test_an_expert_without_tokens_on_any_rank",
        "test_bf16_gathers_stay_close_to_autocast_alone",
        "test_biases_of_experts_and_of_routers",
        "test_from_meta_the_first_weights_do_not_depend_on_the_number_of_ranks",
        "test_blocks_are_compiled_around_the_exchange",
        "test_experts_that_do_not_divide_are_split_by_rows",
        "test_plain_fsdp_of_fewer_experts_than_ranks_splits_their_rows",
        "test_resumed_at_the_same_number_of_ranks_bit_for_bit",
        "test_the_same_run_as_alone_at_unequal_target_counts",
    },
    "test_cli": {"test_a_stopped_run_goes_on_as_if_nothing_had_happened"},
    "test_family": {"test_a_compiled_training_step_has_the_same_gradients"},
    "test_guard": {
        "test_a_parameter_that_is_idle_on_one_rank_or_on_both",
        "test_ranks_agree_when_one_of_them_meets_a_bad_batch",
        "test_ranks_agree_when_one_of_them_sees_a_spike",
        "test_ranks_that_share_matrices_agree_about_a_gradient_of_one_of_them",
        "test_two_ranks_agree_when_one_of_them_meets_a_bad_batch",
    },
    "test_hub": {"test_loading_needs_memory_for_the_model_once"},
    "test_hub_parity": {
        "test_smollm2_equals_transformers",
        "test_smollm2_the_rows_that_llama_cpp_permuted",
        "test_the_test_preset_opens_where_skylar_is_not_installed",
    },
    "test_many_devices": {"test_compiled_block_by_block_under_fsdp"},
    "test_mup": {"test_groups_and_weights_survive_sharding"},
    "test_muon": {
        "test_muon_of_each_ranks_own_part_is_another_optimizer",
        "test_owners_make_bfloat16_as_exact_as_its_gradients",
        "test_the_same_run_as_alone",
        "test_two_ranks_save_and_one_goes_on",
    },
    "test_student": {"test_a_real_lesson_from_start_to_finish"},
    "test_lessons": {"test_rewritten_lessons_run_twice_and_checks_refuse_skeletons"},
    "test_readme": {"test_shell_block_runs_as_typed", "test_python_block_runs_as_typed"},
    "test_reproducible": {
        "test_one_error_line_and_no_warning_of_ddp",
        "test_samples_of_a_sharded_model_are_refused_before_any_work",
        "test_the_same_seed_gives_the_same_bits",
    },
    "test_ppo": {"test_a_flawed_reward_is_exploited_and_a_price_prevents_it"},
    "test_qk_clip": {
        "test_several_ranks_equal_one_process",
        "test_tensor_parallel_ranks_clip_their_own_heads",
    },
    "test_rl_ranks": {
        "test_a_run_goes_on_at_another_number_of_ranks",
        "test_two_ranks_are_the_run_of_one",
    },
    "test_resume": {
        "test_sigkill_at_any_moment_of_saving_leaves_a_whole_checkpoint",
        "test_sigkill_then_resume_is_bit_for_bit",
        "test_sigterm_saves_the_finished_step_then_resume_is_bit_for_bit",
    },
    "test_sft": {"test_ten_examples_are_learned_by_heart"},
    "test_stages": {"test_two_ranks_train_what_one_trains"},
    "test_recipe": {"test_two_ranks_train_what_one_trains"},
    "test_trainer": {"test_compiled_objective_gives_the_same_weights"},
}


def pytest_collection_modifyitems(items):
    for item in items:
        file = getattr(item, "path", None)
        name = getattr(item, "originalname", item.name)
        if file is not None and name in SLOW.get(file.stem, ()):
            item.add_marker("slow")


FAMILIES = ("gpt2", "llama3", "qwen3")
TINY = dict(vocab_size=97, d_model=32, n_heads=4, n_kv_heads=2, n_layers=2, d_ff=64, max_seq_len=64)


@pytest.fixture(scope="session")
def _models() -> dict:
    return {}


@pytest.fixture
def tiny_model(_models):
    """`tiny_model("qwen3", n_layers=3)`: seeded, small, and the test's own copy."""

    def make(family: str = "qwen3", **overrides):
        key = family, tuple(sorted(overrides.items()))
        if key not in _models:
            _models[key] = build_tiny(family, **overrides)
        return copy.deepcopy(_models[key])

    return make


def build_tiny(family: str, **overrides):
    import torch

    from skylar.models.decoder import CausalLM
    from skylar.models.presets import get_config

    sizes = TINY | overrides
    if family == "gpt2":  # it has no key-value heads of their own
        sizes.pop("n_kv_heads")
    config = get_config("test", family=family, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CausalLM(config)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The website, built once for all workers of a run, every warning an error."""
    pytest.importorskip("myst_nb", reason="needs Sphinx: pip install -e '.[docs]'")
    filelock = pytest.importorskip("filelock")
    if not (ROOT / "docs" / "node_modules" / "mermaid").exists():
        pytest.skip("needs MathJax and mermaid: npm install --prefix docs")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "site"
    with filelock.FileLock(shared / "site.lock"):
        if not out.exists():
            command = [sys.executable, ROOT / "docs" / "build.py", "--out", out]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return out
