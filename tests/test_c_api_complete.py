"""Whatever Python has a kernel for, the C library has a function for, or there is a reason why not."""

from __future__ import annotations

from types import ModuleType

import pytest
from c_library import Library

from dlcore import _C
from dlcore._registry import CUDA, REFERENCE

pytestmark = pytest.mark.slow

#: Ops that are no function of the CPU's.
OPS_WITHOUT = {
    "sphere.correct_backward": "no kernel of the CPU's: Python runs the reference",
}

#: Of what functions each function of a module is (a part of) the kernel.
SHARED = {
    "attention": ("attention_intervals",),
    "attention_decode": ("attention_decode",),
    "attention_backward": ("attention_intervals_backward",),
    "bit_logits": ("bits_matched_filter", "bits_posterior"),
    "bit_step": ("bits_step",),
    "bit_perturb": ("bits_perturb",),
    "bit_spans": ("bits_loss",),
    "bit_loss": ("bits_loss",),
    "bit_loss_sums": ("bits_loss",),
    "bit_loss_backward": ("bits_loss_backward",),
    "bit_encode": ("bits_encode",),
    "bit_decode": ("bits_decode",),
    "scan": ("categorical_stats", "categorical_sample", "categorical_sample_mixture"),
    "scan_bytes": ("categorical_workspace",),
    "finish_stats": ("categorical_stats",),
    "finish_summary": ("categorical_summary",),
    "finish_sample": ("categorical_sample",),
    "plan_mixture": ("categorical_sample_mixture",),
    "finish_mixture": ("categorical_sample_mixture",),
    **dict.fromkeys(
        ("histogram", "start_selections", "narrow", "finish_selections", "find_ends", "cut_rows"),
        ("categorical_sample",),
    ),
    "finish_log_probs": ("categorical_log_probs",),
    "log_probs_backward": ("categorical_log_probs_backward",),
    "clear_kl": ("categorical_kl",),
    "kl": ("categorical_kl",),
    "kl_bytes": ("categorical_kl_workspace",),
    "finish_kl": ("categorical_kl",),
    "kl_backward": ("categorical_kl_backward",),
    "softmax_tile": ("categorical_expectation", "categorical_expectation_backward"),
    "follow_largest": ("categorical_expectation", "sphere_velocity"),
    "finish_logsumexp": ("categorical_expectation", "sphere_velocity"),
    "matmul": ("categorical_expectation", "sphere_velocity"),
    "start_nelbo": ("uniform_nelbo",),
    "nelbo_bytes": ("categorical_workspace",),
    "nelbo": ("uniform_nelbo",),
    "finish_nelbo": ("uniform_nelbo",),
    "nelbo_backward": ("uniform_nelbo_backward",),
    "fill_noise": ("rng_uniform", "rng_gumbel"),
    "fill_normal": ("rng_normal",),
    "fold_in": ("rng_fold_in",),
    "sphere_map": ("sphere_slerp", "sphere_slerp_backward"),
    "sphere_sample": ("sphere_sample",),
    "sphere_correct": ("sphere_correct",),
    "sphere_correct_backward": ("sphere_correct_backward",),
    "sphere_weights": ("sphere_velocity",),
    "sphere_velocity_backward": ("sphere_velocity_backward",),
    "largest": ("sphere_largest",),
    "row_cosine": ("similarity_cosine",),
    "guided_step": ("guidance_cfg_uniform_step",),
    "guided_step_bytes": ("guidance_workspace",),
    "capability": ("cpu_capability",),
    "choose_capability": ("choose_cpu_capability",),
}

#: What is no function, and why.
EXPORTS_WITHOUT = {
    "read": "the memory's ceiling, which benchmarks compare with",
    "philox": "for tests of the stream",
    "gumbel_of_bits": "for tests of the stream",
    "parallel_runtime": "which OpenMP runtime is Python's; the header says how the library finds its own",
}


def _functions(module: ModuleType) -> set[str]:
    exports = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    return {name for name, value in exports.items() if callable(value) and not isinstance(value, type)}


def test_every_op_is_a_function(c: Library) -> None:
    missing = {op for op in REFERENCE if f"dlcore_{op.replace('.', '_')}" not in c.functions}
    assert missing == OPS_WITHOUT.keys()


def test_every_op_with_cuda_kernels_is_a_function(cuda_c: Library) -> None:
    ops = {op for ops in CUDA.values() for op in ops}
    assert {op for op in ops if f"dlcore_cuda_{op.replace('.', '_')}" not in cuda_c.functions} == set()


def test_every_kernel_is_in_a_function(c: Library) -> None:
    exports = _functions(_C)
    assert exports - SHARED.keys() - EXPORTS_WITHOUT.keys() == set()
    assert exports >= EXPORTS_WITHOUT.keys()
    for name in exports & SHARED.keys():
        assert {f"dlcore_{function}" for function in SHARED[name]} <= c.functions.keys()


def test_every_cuda_kernel_is_in_a_function(cuda_c: Library, cuda_kernels: None) -> None:
    from dlcore import _cuda

    exports = _functions(_cuda)
    assert exports - SHARED.keys() == set()
    for name in exports:
        assert {f"dlcore_cuda_{function}" for function in SHARED[name]} <= cuda_c.functions.keys()
