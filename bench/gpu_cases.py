"""The calls that `make bench-gpu` measures: dlcore's, and those of torch and of others beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import dlcore
from bench import (
    peers,
    peers_attention,
    peers_bits,
    peers_head,
    peers_sphere,
    peers_sphere_velocity,
)
from bench.bench_guidance import ALPHA_S, ALPHA_T, GAMMA, posteriors
from dlcore import attention, bits, categorical, rng, similarity, sphere
from dlcore.process import absorbing_uniform, guidance, masked, uniform, unmask

Call = Callable[[], Any]


class Work(NamedTuple):
    """Calls by provider, and what any of them must do at least, where that may bind it: bytes to read and to
    write, operations of matrix products.

    A provider in `parts` takes one of so many parts of the rows, lest it run out of memory.
    """

    calls: dict[str, Call]
    reads: int = 0
    writes: int = 0
    flops: int = 0
    parts: dict[str, int] | None = None


class Case(NamedTuple):
    """What to build for a device, with small shapes for a smoke test."""

    name: str
    build: Callable[[str, bool], Work]


def _compiled(function: Callable[..., Any], *args: Any) -> Call:
    compiled = torch.compile(function, dynamic=False)
    return lambda: compiled(*args)


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _logits(device: str, tiny: bool, rows: int = 8192, vocab: int = 126_464) -> Tensor:
    shape = (4, 600) if tiny else (rows, vocab)
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _trained(function: Callable[..., Any], *inputs: Tensor) -> Call:
    """The call and the gradients of what it gives."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


def _chains(function: Callable[..., Any], *args: Any) -> dict[str, Call]:
    """The chain as it stands, and compiled."""
    return {"eager": lambda: function(*args), "compile": _compiled(function, *args)}


def _trained_chains(function: Callable[..., Any], *inputs: Tensor) -> dict[str, Call]:
    """The same with gradients."""
    return {
        "eager": _trained(function, *inputs),
        "compile": _trained(torch.compile(function, dynamic=False), *inputs),
    }


def _sample(device: str, tiny: bool, **shape: int) -> Work:
    x, key = _logits(device, tiny, **shape), rng.key(1, device=device)
    calls = {
        "dlcore": lambda: categorical.sample(x, key=key),
        **_chains(peers.sample, x),
        "argmax": lambda: x.argmax(-1),
    }
    return Work(calls, _size(x))


def _stats(device: str, tiny: bool) -> Work:
    x = _logits(device, tiny)
    parts = 1 if tiny else 8
    some = x[: len(x) // parts]
    calls = {"dlcore": lambda: categorical.stats(x), **_chains(peers.stats, some)}
    return Work(calls, _size(x), parts={"eager": parts, "compile": parts})


def _few_rows(device: str, tiny: bool) -> Work:
    x, key = _logits(device, tiny)[:4].clone(), rng.key(1, device=device)
    calls = {"dlcore": lambda: categorical.sample(x, key=key), **_chains(peers.sample, x)}
    return Work(calls, _size(x))


def _top_p(device: str, tiny: bool) -> Work:
    x, key = _logits(device, tiny)[:1024], rng.key(1, device=device)
    calls = {
        "dlcore": lambda: categorical.sample(x, top_p=0.9, key=key),
        "dlcore, top_k": lambda: categorical.sample(x, top_k=50, key=key),
        "eager": lambda: peers.sample_top_p(x, 0.9),
    }
    return Work(calls, _size(x))


def _step(device: str, tiny: bool) -> Work:
    x, key = _logits(device, tiny), rng.key(1, device=device)
    z = torch.zeros(x.shape[:-1], dtype=torch.int64, device=device)
    alpha, then = torch.full((), 0.5, device=device), torch.full((), 0.6, device=device)
    parts = 1 if tiny else 8
    some = x.shape[0] // parts
    calls = {
        "dlcore": lambda: uniform.step(x, z, alpha, then, key=key),
        **_chains(peers.loo_step, x[:some], z[:some], 0.5, 0.6),
    }
    return Work(calls, _size(x), parts={"eager": parts, "compile": parts})


def _process_step(device: str, tiny: bool, absorbing: bool) -> Work:
    """A step that reads every row: all are masked, or hold their noise tokens."""
    x, key = _logits(device, tiny), rng.key(1, device=device)
    mask_id, parts = x.shape[-1] - 1, 1 if tiny else 8
    z = torch.full(x.shape[:-1], mask_id, device=device)
    some, here = x[: len(x) // parts], z[: len(x) // parts]
    if absorbing:
        ours = partial(absorbing_uniform.step, x, z, z, 0.5, 1.0, key=key)
        chains = _chains(peers.absorbing_step, some, here, here, 0.5, 1.0)
    else:
        ours = partial(masked.step, x, z, 0.5, 1.0, mask_id, key=key)
        chains = _chains(lambda: peers.mdlm_step(some.float(), here, 0.5, 1.0, mask_id))
    return Work({"dlcore": ours, **chains}, _size(x), parts={"eager": parts, "compile": parts})


def _select(device: str, tiny: bool) -> Work:
    score = torch.rand((4, 64) if tiny else (512, 4096), device=device)
    candidates = torch.rand_like(score) < 0.5

    def torchs(score: Tensor, candidates: Tensor) -> Tensor:
        """LLaDA's rule, sequences together."""
        best = score.where(candidates, -torch.inf).topk(4).indices
        return torch.zeros_like(candidates).scatter(-1, best, True)

    calls = {
        "dlcore": lambda: unmask.select(score, candidates, top_k=4),
        **_chains(torchs, score, candidates),
    }
    return Work(calls, _size(score, candidates), _size(candidates))


def _guided(device: str, tiny: bool) -> Work:
    shape = (4, 600) if tiny else (2048, 50_257)
    cond, uncond = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    z, key = torch.zeros(shape[:-1], dtype=torch.int64, device=device), rng.key(1, device=device)
    alpha_t, alpha_s, gamma = (torch.full((), x, device=device) for x in (ALPHA_T, ALPHA_S, GAMMA))
    calls = {
        "dlcore": lambda: guidance.cfg_uniform_step(cond, uncond, z, alpha_t, alpha_s, gamma, key=key),
        **_chains(lambda c, u: posteriors(c.float(), u.float(), z), cond, uncond),
    }
    return Work(calls, _size(cond, uncond))


def _nelbo(device: str, tiny: bool) -> Work:
    x = _logits(device, tiny, 2048)
    z, clean = (torch.zeros(x.shape[:-1], dtype=torch.int64, device=device) for _ in range(2))
    level, slope = torch.full((), 0.5, device=device), torch.full((), -1.0, device=device)

    def torchs(x: Tensor) -> Tensor:
        return peers.duo_nelbo(x.float(), z, clean, 0.5, -1.0)

    dlcores = _trained(lambda x: uniform.nelbo(x, z, clean, level, slope), x)
    # A scan, its sums, and the gradient.
    return Work({"dlcore": dlcores, **_trained_chains(torchs, x)}, 3 * _size(x), _size(x))


def _kl(device: str, tiny: bool) -> Work:
    p, q = _logits(device, tiny, 2048), _logits(device, tiny, 2048)

    def torchs(p: Tensor, q: Tensor) -> Tensor:
        return peers.kl(p.float(), q.float())

    calls = {"dlcore": _trained(categorical.kl, p, q), **_trained_chains(torchs, p, q)}
    return Work(calls, 2 * _size(p, q), _size(p, q))


def _expectation(device: str, tiny: bool) -> Work:
    x, width = _logits(device, tiny, 2048), 16 if tiny else 1024
    table = torch.randn(x.shape[-1], width, device=device, dtype=torch.bfloat16)
    calls = {"dlcore": lambda: categorical.expectation(x, table), **_chains(peers.expectation, x, table)}
    return Work(calls, _size(x, table), flops=2 * x.shape[0] * table.numel())


def _velocity(device: str, tiny: bool) -> Work:
    count, vocab, width = (4, 600, 16) if tiny else (2048, 50_257, 768)
    logits = torch.randn(count, vocab, device=device, dtype=torch.bfloat16)
    x = F.normalize(torch.randn(count, width, device=device), dim=-1)
    table = F.normalize(torch.randn(vocab, width, device=device), dim=-1).bfloat16()
    narrow = x.bfloat16()
    calls = {
        "dlcore": lambda: sphere.velocity(x, logits, table),
        **_chains(peers_sphere_velocity.slerp, logits, narrow, table),
    }
    return Work(calls, _size(logits, table), flops=4 * count * table.numel())


def _cross_entropy(device: str, tiny: bool) -> Work:
    x = _logits(device, tiny)
    target = torch.zeros(x.shape[:-1], dtype=torch.int64, device=device)

    def torchs(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), target, reduction="none")

    dlcores = _trained(lambda x: categorical.cross_entropy(x, target), x)
    return Work({"dlcore": dlcores, **_trained_chains(torchs, x)}, 2 * _size(x), _size(x))


def _head_of(device: str, tiny: bool, rows: int) -> tuple[Tensor, Tensor]:
    count, width, vocab = (4, 16, 600) if tiny else (rows, 4096, 126_464)
    hidden = torch.randn(count, width, device=device, dtype=torch.bfloat16)
    return hidden, torch.randn(vocab, width, device=device, dtype=torch.bfloat16) / width**0.5


def _head(device: str, tiny: bool, rows: int) -> Work:
    hidden, weight = _head_of(device, tiny, rows)
    head, key = dlcore.LinearLogits(hidden, weight), rng.key(1, device=device)
    calls = {
        "dlcore": lambda: categorical.sample(head, key=key),
        **_chains(lambda hidden, weight: peers.sample(hidden @ weight.mT), hidden, weight),
        "product alone": lambda: hidden @ weight.mT,
    }
    return Work(calls, _size(hidden, weight), flops=2 * len(hidden) * weight.numel())


def _head_loss(device: str, tiny: bool, rows: int) -> Work:
    hidden, weight = _head_of(device, tiny, rows)
    target = torch.zeros(len(hidden), dtype=torch.int64, device=device)

    def dlcores(hidden: Tensor, weight: Tensor) -> Tensor:
        return categorical.cross_entropy(dlcore.LinearLogits(hidden, weight), target)

    def torchs(hidden: Tensor, weight: Tensor) -> Tensor:
        return peers_head.cross_entropy(hidden, weight, target)

    calls = {
        "dlcore": _trained(dlcores, hidden, weight),
        "chunks of rows": lambda: peers_head.chunked_cross_entropy(hidden, weight, target),
        **_trained_chains(torchs, hidden, weight),
    }
    # The logits once, and a product for each gradient.
    return Work(calls, 2 * _size(hidden, weight), _size(hidden, weight), 6 * len(hidden) * weight.numel())


def _head_mean(device: str, tiny: bool, rows: int) -> Work:
    hidden, weight = _head_of(device, tiny, rows)
    head = dlcore.LinearLogits(hidden, weight)

    def torchs(hidden: Tensor, weight: Tensor) -> Tensor:
        return peers.expectation(hidden @ weight.mT, weight)

    calls = {"dlcore": lambda: categorical.expectation(head, weight), **_chains(torchs, hidden, weight)}
    return Work(calls, _size(hidden, weight), flops=4 * len(hidden) * weight.numel())


def _block_diffusion(device: str, tiny: bool, backward: bool = False, block: int = 32) -> Work:
    batch, length, block, heads, width = (1, 32, 8, 2, 16) if tiny else (2, 4096, block, 16, 128)
    made = _trained if backward else lambda function, *inputs: lambda: function(*inputs)
    q, k, v = (
        torch.randn(batch, 2 * length, heads, width, device=device, dtype=torch.bfloat16) for _ in range(3)
    )
    t = [x.transpose(1, 2) for x in (q, k, v)]

    calls = {
        "dlcore": made(partial(attention.block_diffusion, block_size=block), q, k, v),
        "SDPA, unmasked": made(peers_attention.unmasked, *t),
    }
    if not tiny:
        rule = peers_attention.training_rule(length, block)
        calls["flex_attention"] = made(peers_attention.flex(rule, 2 * length, 2 * length, device), *t)
    # A row of block i, noisy or clean, sees i + 1 blocks.
    return Work(calls, flops=_products(backward) * batch * heads * width * length * (length + block))


def _products(backward: bool) -> int:
    """Operations of a visible pair and a head's dimension: two products, with gradients five more."""
    return 14 if backward else 4


def _block_causal(device: str, tiny: bool, backward: bool = False) -> Work:
    batch, length, block, heads, width = (1, 32, 8, 2, 16) if tiny else (2, 8192, 32, 16, 128)
    made = _trained if backward else lambda function, *inputs: lambda: function(*inputs)
    q, k, v = (torch.randn(batch, length, heads, width, device=device).bfloat16() for _ in range(3))
    t = [x.transpose(1, 2) for x in (q, k, v)]
    calls = {
        "dlcore": made(partial(attention.block_causal, block_size=block), q, k, v),
        "SDPA, causal": made(partial(F.scaled_dot_product_attention, is_causal=True), *t),
    }
    if not tiny:
        rule = peers_attention.causal_rule(block)
        calls["flex_attention"] = made(peers_attention.flex(rule, length, length, device), *t)
    return Work(calls, flops=_products(backward) * batch * heads * width * length * (length + block) // 2)


def _decode(device: str, tiny: bool, heads: int = 8, page_size: int | None = None) -> Work:
    batch, cached, block, kv_heads, width = (1, 32, 8, 2, 16) if tiny else (16, 4096, 32, 8, 128)
    heads = min(heads, 4) if tiny else heads
    q, k, v = (
        torch.randn(batch, block, n, width, device=device, dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads)
    )
    room = cached + 2 * block
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "page_size": page_size}
    cache = attention.KVCache(1, batch, room, kv_heads, width, **options)
    for store in cache.view(0):
        store.normal_()
    cache.lengths.fill_(cached)
    keys = torch.randn(batch, kv_heads, cached + block, width, device=device, dtype=torch.bfloat16)
    grouped = partial(F.scaled_dot_product_attention, enable_gqa=heads != kv_heads)
    calls: dict[str, Call] = {
        "dlcore": lambda: attention.decode(q, k, v, cache, 0),
        "SDPA": lambda: grouped(q.transpose(1, 2), keys, keys),
    }
    if not tiny and page_size is None:
        store = keys.transpose(1, 2).contiguous()
        calls |= peers_attention.serving(q, k, v, store, store.clone(), cache.lengths)
    return Work(calls, 2 * _size(keys))


def _bits(device: str, tiny: bool) -> Work:
    x = torch.randn((4, 64) if tiny else (4096, 16_384), device=device)
    residual, key = torch.randn_like(x), rng.key(1, device=device)
    calls = {
        "dlcore": lambda: bits.step(x, residual, 1.0, 0.9, key=key),
        **_chains(peers_bits.step, x, residual, 1.0, 0.9),
    }
    return Work(calls, _size(x, residual), 2 * _size(x))


def _bits_loss(device: str, tiny: bool) -> Work:
    x = torch.randn((4, 64) if tiny else (4096, 16_384), device=device)
    residual, clean = torch.randn_like(x), torch.randint_like(x, 2)

    def torchs(residual: Tensor) -> Tensor:
        return peers_bits.squared_loss(residual, x, clean, 1.0)

    dlcores = _trained(lambda residual: bits.loss(residual, x, clean, 1.0), residual)
    reads = 2 * _size(residual, x, clean)
    return Work({"dlcore": dlcores, **_trained_chains(torchs, residual)}, reads, _size(residual))


def _encode(device: str, tiny: bool) -> Work:
    tokens, width = torch.randint(2**16, (4, 8) if tiny else (4096, 1024), device=device), 17
    calls = {"dlcore": lambda: bits.encode(tokens, width), **_chains(peers_bits.encode, tokens, width)}
    return Work(calls, _size(tokens), 4 * width * tokens.numel())


def _decode_bits(device: str, tiny: bool) -> Work:
    width, vocab = 17, 126_464
    x = torch.randn((4, 8, width) if tiny else (4096, 1024, width), device=device)
    calls = {
        "dlcore": lambda: bits.decode(x, vocab_size=vocab),
        **_chains(peers_bits.decode, x, vocab),
    }
    return Work(calls, _size(x), x.numel() // width * 8)


def _corrupt(device: str, tiny: bool) -> Work:
    x, key = torch.randn((4, 64) if tiny else (4096, 16_384), device=device), rng.key(1, device=device)

    def torchs(x: Tensor) -> Tensor:
        return x + 0.8 * torch.randn_like(x)

    return Work(
        {"dlcore": lambda: bits.corrupt(x, 0.8, key=key), **_chains(torchs, x)},
        *(_size(x), _size(x)),
    )


def _normal(device: str, tiny: bool) -> Work:
    shape, key = (4, 64) if tiny else (4096, 16_384), rng.key(1, device=device)
    chains = _chains(lambda: torch.randn(shape, device=device))
    return Work({"dlcore": lambda: rng.normal(key, shape), **chains}, writes=4 * shape[0] * shape[1])


def _cosine(device: str, tiny: bool) -> Work:
    batch, rows, heads, width = (1, 4, 2, 16) if tiny else (16, 1024, 8, 128)
    new, held = (
        torch.randn(batch, n, heads, width, device=device, dtype=torch.bfloat16) for n in (rows, 2 * rows)
    )
    at = torch.arange(rows, device=device).expand(batch, rows) + rows // 2

    def torchs(new: Tensor, held: Tensor, at: Tensor) -> Tensor:
        held = held.gather(1, at[..., None, None].expand_as(new))
        return F.cosine_similarity(new.flatten(2), held.flatten(2), dim=-1)

    calls = {"dlcore": lambda: similarity.cosine(new, held, at), **_chains(torchs, new, held, at)}
    return Work(calls, 2 * _size(new))


def _points(device: str, tiny: bool, count: int) -> list[Tensor]:
    shape = (4, 64) if tiny else (65_536, 768)
    return [F.normalize(torch.randn(shape, device=device), dim=-1) for _ in range(count)]


def _slerp(device: str, tiny: bool) -> Work:
    x, y = _points(device, tiny, 2)
    t = torch.full(x.shape[:1], 0.4, device=device)
    calls = {"dlcore": lambda: sphere.slerp(x, y, t), **_chains(peers_sphere.slerp, x, y, t)}
    return Work(calls, _size(x, y), _size(x))


def _slerp_backward(device: str, tiny: bool) -> Work:
    x, y = _points(device, tiny, 2)
    t = torch.full(x.shape[:1], 0.4, device=device)
    calls = {"dlcore": _trained(sphere.slerp, x, y, t), **_trained_chains(peers_sphere.slerp, x, y, t)}
    # The points forward, and with their gradient backward.
    return Work(calls, 5 * _size(x), 3 * _size(x))


def _sphere_map(device: str, tiny: bool, name: str, count: int = 2) -> Work:
    x = _points(device, tiny, count)
    calls = {"dlcore": lambda: getattr(sphere, name)(*x), **_chains(getattr(peers_sphere, name), *x)}
    return Work(calls, _size(*x), _size(x[0]))


def _correct(device: str, tiny: bool) -> Work:
    x, y = _points(device, tiny, 2)
    score, key = sphere.project(x, y), rng.key(1, device=device)
    size = 0.5 / (x.shape[-1] - 1)
    calls = {
        "dlcore": lambda: sphere.correct(x, score, size, key=key),
        **_chains(peers_sphere.correct, x, score, size),
    }
    return Work(calls, _size(x, score), _size(x))


def _sphere_step(device: str, tiny: bool) -> Work:
    x, y = _points(device, tiny, 2)
    v = sphere.project(x, y)

    def torchs(x: Tensor, v: Tensor) -> Tensor:
        return F.normalize(peers_sphere.exp_map(x, 0.1 * v), dim=-1)

    calls = {"dlcore": lambda: sphere.step(x, v, 0.1), **_chains(torchs, x, v)}
    return Work(calls, _size(x, v), _size(x))


def _vmf(device: str, tiny: bool) -> Work:
    (mean,) = _points(device, tiny, 1)
    kappa, key = torch.full(mean.shape[:1], 50.0, device=device), rng.key(1, device=device)
    calls = {
        "dlcore": lambda: sphere.vmf.sample(mean, kappa, key=key),
        "eager": lambda: peers_sphere.sample_vmf(mean, kappa),
        "eager, in rounds": lambda: peers_sphere.sample_vmf_in_rounds(mean, kappa),
        "compile": _compiled(peers_sphere.sample_vmf_in_rounds, mean, kappa),
    }
    return Work(calls, _size(mean), _size(mean))


CASES = (
    Case("categorical.sample", _sample),
    Case("categorical.sample, 4 rows", _few_rows),
    Case("categorical.sample, 16 rows of 262144", partial(_sample, rows=16, vocab=262_144)),
    Case("categorical.sample, truncated, 1024 rows", _top_p),
    Case("categorical.stats", _stats),
    Case("uniform.step", _step),
    Case("masked.step", partial(_process_step, absorbing=False)),
    Case("absorbing_uniform.step", partial(_process_step, absorbing=True)),
    Case("unmask.select", _select),
    Case("categorical.cross_entropy, backward", _cross_entropy),
    Case("categorical.kl, backward", _kl),
    Case("categorical.expectation", _expectation),
    Case("guidance.cfg_uniform_step, V=50257", _guided),
    Case("uniform.nelbo, backward", _nelbo),
    *(Case(f"LinearLogits sample, {n} rows", partial(_head, rows=n)) for n in (8192, 256, 8)),
    Case("LinearLogits cross_entropy, backward", partial(_head_loss, rows=4096)),
    Case("LinearLogits expectation", partial(_head_mean, rows=2048)),
    Case("attention.block_diffusion", _block_diffusion),
    Case("attention.block_diffusion, blocks of 16", partial(_block_diffusion, block=16)),
    Case("attention.block_diffusion, backward", partial(_block_diffusion, backward=True)),
    Case("attention.block_causal", _block_causal),
    Case("attention.block_causal, backward", partial(_block_causal, backward=True)),
    Case("attention.decode", _decode),
    Case("attention.decode, 32 heads on 8", partial(_decode, heads=32)),
    Case("attention.decode, pages of 16", partial(_decode, page_size=16)),
    Case("bits.step", _bits),
    Case("bits.loss, backward", _bits_loss),
    Case("bits.encode", _encode),
    Case("bits.decode", _decode_bits),
    Case("bits.corrupt", _corrupt),
    Case("rng.normal", _normal),
    Case("similarity.cosine", _cosine),
    Case("sphere.slerp", _slerp),
    Case("sphere.slerp, backward", _slerp_backward),
    Case("sphere.exp_map", partial(_sphere_map, name="exp_map")),
    Case("sphere.log_map", partial(_sphere_map, name="log_map")),
    Case("sphere.rotate", partial(_sphere_map, name="rotate", count=3)),
    Case("sphere.step", _sphere_step),
    Case("sphere.correct", _correct),
    Case("sphere.velocity", _velocity),
    Case("vmf.sample", _vmf),
)
