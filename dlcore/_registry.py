"""Stands every backend's implementation behind its op."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dlcore import _ops
from dlcore._dispatch import Preference, implement, prefer
from dlcore.reference import (
    attention,
    bits,
    categorical,
    guidance,
    rng,
    similarity,
    sphere,
    sphere_dynamics,
    sphere_velocity,
    uniform,
    vmf,
)
from dlcore.reference.backward import gradients
from dlcore.triton import launch


def _always(*_: Any) -> list[str]:
    return []


def _backward(function: Callable[..., Tensor], wanted: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    def backward(grad: Tensor, _: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return gradients(function, inputs, wanted, grad)

    return backward


def _backward_about(
    function: Callable[..., Tensor], wanted: tuple[int, ...], results: int = 1
) -> Callable[..., tuple[Tensor, ...]]:
    """Of a function of the forward pass's results and inputs."""

    def backward(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
        return gradients(partial(function, *saved[:results]), saved[results:], wanted, grad)

    return backward


def _map_backward(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def backward(grad: Tensor, needed: list[bool], *inputs: Tensor) -> Any:
        wanted = tuple(i for i, n in enumerate(needed) if n)
        found = iter(gradients(function, inputs, wanted, grad))
        grads = tuple(next(found) if n else x.new_empty(0) for x, n in zip(inputs, needed, strict=True))
        return grads if len(grads) > 1 else grads[0]

    return backward


def _bits_loss_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *arguments, with_x = inputs
    found = gradients(bits.loss, tuple(arguments), (0, 1) if with_x else (0,), grad)
    return found if with_x else (*found, arguments[1].new_empty(0))


def _velocity_backward(grad: Tensor, _: Tensor, __: Tensor, ___: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *arguments, with_x, with_table = inputs
    grads = gradients(lambda *a: sphere_velocity.velocity(*a)[0], tuple(arguments), (0, 1, 2, 3, 4), grad)
    empty = grad.new_empty(0)
    return (*grads[:3], grads[3] if with_x else empty, grads[4] if with_table else empty.clone())


REFERENCE: dict[str, Callable[..., Any]] = {
    "attention.decode": attention.decode,
    "attention.intervals": attention.intervals,
    "attention.intervals_backward": attention.intervals_backward,
    "bits.encode": bits.encode,
    "bits.decode": bits.decode,
    "bits.matched_filter": bits.matched_filter,
    "bits.posterior": bits.posterior,
    "bits.step": bits.step,
    "bits.perturb": bits.perturb,
    "bits.loss": bits.loss,
    "bits.loss_backward": _bits_loss_backward,
    "rng.fold_in": rng.fold_in,
    "rng.uniform": rng.uniform,
    "rng.normal": rng.normal,
    "rng.gumbel": rng.gumbel,
    "categorical.stats": categorical.stats,
    "categorical.summary": categorical.summary,
    "categorical.sample": categorical.sample,
    "categorical.sample_mixture": categorical.sample_mixture,
    "categorical.log_probs": categorical.log_probs,
    "categorical.log_probs_backward": _backward_about(categorical.log_probs_about, (0, 1, 2)),
    "categorical.kl": categorical.kl,
    "categorical.kl_backward": _backward_about(categorical.kl_about, (0, 1, 2, 3, 4, 5)),
    "categorical.expectation": categorical.expectation,
    "categorical.expectation_backward": _backward_about(categorical.expectation_about, (0, 1, 2, 3), 2),
    "categorical.sample_expectation": categorical.sample_expectation,
    "guidance.cfg_uniform_step": guidance.cfg_uniform_step,
    "similarity.cosine": similarity.cosine,
    "sphere.correct": sphere_dynamics.correct,
    "sphere.correct_backward": sphere_dynamics.correct_backward,
    "sphere.largest": sphere_velocity.largest,
    "sphere.sample": vmf.sample,
    "sphere.step": sphere.step,
    "sphere.velocity": sphere_velocity.velocity,
    "sphere.velocity_backward": _velocity_backward,
    "uniform.nelbo": uniform.nelbo,
    "uniform.nelbo_backward": _backward(lambda *a: uniform.nelbo(*a)[0], (0, 1, 2)),
}

for _name in _ops.sphere.MAPS:
    _map = getattr(sphere, _name)
    REFERENCE |= {f"sphere.{_name}": _map, f"sphere.{_name}_backward": _map_backward(_map)}

#: What a draw or a statistic says carries no gradient.
NOT_DIFFERENTIABLE = (
    "attention.decode",
    "bits.step",
    "bits.perturb",
    "categorical.stats",
    "categorical.summary",
    "categorical.sample",
    "categorical.sample_mixture",
    "guidance.cfg_uniform_step",
    "similarity.cosine",
    "sphere.largest",
    "sphere.sample",
    "sphere.step",
)

for _op, _function in REFERENCE.items():
    _function = torch.no_grad()(_function) if _op in NOT_DIFFERENTIABLE else _function
    implement(_op, "reference", _function, _always)


def _compiled() -> tuple[dict[str, Any], Callable[..., list[str]]]:
    """The compiled families, and why they can't take some arguments; empty if the module is not built."""
    try:
        from dlcore.cpu import (
            attention,
            bits,
            categorical,
            guidance,
            rng,
            similarity,
            sphere,
            sphere_dynamics,
            sphere_velocity,
            tensors,
            uniform,
        )
    except ImportError as error:
        reason = f"the compiled module dlcore._C can't be imported: {error}"
        return {}, lambda *_: [reason]
    return {
        "attention": attention,
        "bits": bits,
        "categorical": categorical,
        "guidance": guidance,
        "rng": rng,
        "similarity": similarity,
        "sphere": SimpleNamespace(**vars(sphere) | vars(sphere_dynamics) | vars(sphere_velocity)),
        "uniform": uniform,
    }, tensors.reasons


#: What stands before the logits in a backward op: the gradient and what the forward pass saved.
SAVED = {
    "bits.loss": 1,
    "categorical.log_probs": 2,
    "categorical.kl": 2,
    "categorical.expectation": 3,
    "sphere.velocity": 4,
    "uniform.nelbo": 2,
}


def _of_logits(reasons: Callable[..., list[str]], saved: int) -> Callable[..., list[str]]:
    return lambda *args: reasons(*args[saved:])


_families, _reasons = _compiled()
for _op in REFERENCE:
    _family, _name = _op.split(".")
    _saved = SAVED.get(_op.removesuffix("_backward"), 0) if _op.endswith("_backward") else 0
    _function = getattr(_families.get(_family), _name, _always)
    implement(_op, "cpu", _function, _of_logits(_reasons, _saved) if _saved else _reasons)

#: The ops of each module of dlcore.triton, which is imported when one of them first runs: importing dlcore
#: imports no Triton.
TRITON: dict[str, tuple[str, ...]] = {
    "attention": ("attention.intervals", "attention.intervals_backward", "attention.decode"),
    "bits": tuple(op for op in REFERENCE if op.startswith("bits.")),
    "categorical": (
        "categorical.stats",
        "categorical.summary",
        "categorical.sample",
        "categorical.sample_mixture",
    ),
    "categorical_losses": (
        "categorical.log_probs",
        "categorical.log_probs_backward",
        "categorical.kl",
        "categorical.kl_backward",
    ),
    "categorical_expectation": (
        "categorical.expectation",
        "categorical.expectation_backward",
        "categorical.sample_expectation",
    ),
    "guidance": ("guidance.cfg_uniform_step",),
    "rng": ("rng.fold_in", "rng.uniform", "rng.normal", "rng.gumbel"),
    "similarity": ("similarity.cosine",),
    "sphere": (
        *(f"sphere.{name}{suffix}" for name in _ops.sphere.MAPS for suffix in ("", "_backward")),
        "sphere.step",
    ),
    "sphere_dynamics": ("sphere.correct", "sphere.correct_backward"),
    "sphere_sample": ("sphere.sample",),
    "sphere_velocity": ("sphere.largest", "sphere.velocity", "sphere.velocity_backward"),
    "uniform": ("uniform.nelbo", "uniform.nelbo_backward"),
}


#: The ops of each module of dlcore.cuda.
CUDA: dict[str, tuple[str, ...]] = {
    "bits": tuple(op for op in REFERENCE if op.startswith("bits.")),
    "categorical": (
        "categorical.stats",
        "categorical.summary",
        "categorical.sample",
        "categorical.sample_mixture",
        "categorical.log_probs",
        "categorical.log_probs_backward",
        "categorical.kl",
        "categorical.kl_backward",
    ),
    "guidance": TRITON["guidance"],
    "rng": TRITON["rng"],
    "sphere": (*TRITON["sphere"], *TRITON["sphere_dynamics"], "sphere.sample"),
    "uniform": ("uniform.nelbo", "uniform.nelbo_backward"),
}


def _measured(first: str, times: dict[str, str]) -> dict[str, Preference]:
    then = {"cuda": "triton", "triton": "cuda"}[first]
    return {op: Preference(first, then, f"{x} times as fast on an H200") for op, x in times.items()}


#: What bench/results/nvidia-h200-2026-11-26.json says, by replays of graphs.
MEASURED = _measured(
    "cuda",
    {
        "bits.decode": "11.5",
        "bits.encode": "1.6",
        "categorical.sample": "truncated 4 to 8, else (but for few rows) 1.1",
        "categorical.sample_mixture": "1.1",
        "categorical.stats": "1.04",
        "uniform.nelbo": "1.5",
        "uniform.nelbo_backward": "1.5",
    },
) | _measured(
    "triton",
    {
        "bits.loss": "1.2",
        "bits.loss_backward": "1.2",
        "bits.perturb": "1.3",
        "bits.step": "1.2",
        "categorical.kl": "1.2",
        "categorical.kl_backward": "1.2",
        "categorical.log_probs": "1.3",
        "categorical.log_probs_backward": "1.3",
        "guidance.cfg_uniform_step": "1.06",
        "rng.normal": "1.1",
        "sphere.correct": "2.2",
        "sphere.exp_map": "1.1",
        "sphere.log_map": "1.2",
        "sphere.rotate": "1.2",
        "sphere.sample": "2.5",
        "sphere.slerp": "1.3",
        "sphere.slerp_backward": "1.4",
        "sphere.step": "1.4",
    },
)

#: What runs CUDA tensors unasked where an op has kernels of both kinds, op by op.
PREFERRED: dict[str, Preference] = {
    op: Preference("triton", "cuda", "cuda was not measured on a device")
    for ops in CUDA.values()
    for op in ops
} | MEASURED

for _op, _preference in PREFERRED.items():
    prefer(_op, _preference)


def _on_first_use(module: str, name: str) -> Callable[..., Any]:
    @cache
    def function() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(f"dlcore.{module}"), name)
        return found

    return lambda *args: function()(*args)


def _cuda_reasons(*args: Any) -> list[str]:
    try:
        from dlcore.cuda.tensors import reasons
    except ImportError as error:
        return [f"the compiled module dlcore._cuda can't be imported: {error}"]
    return reasons(*args)


for _backend, _modules, _backend_reasons in (
    ("triton", TRITON, launch.reasons),
    ("cuda", CUDA, _cuda_reasons),
):
    for _module, _ops_of_module in _modules.items():
        for _op in _ops_of_module:
            _saved = SAVED.get(_op.removesuffix("_backward"), 0) if _op.endswith("_backward") else 0
            _taken = _of_logits(_backend_reasons, _saved) if _saved else _backend_reasons
            implement(_op, _backend, _on_first_use(f"{_backend}.{_module}", _op.split(".")[1]), _taken)
