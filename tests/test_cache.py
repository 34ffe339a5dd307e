"""Refresh policies for approximate caches, on a small bidirectional transformer with random weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attention_oracles import normal
from torch._dynamo.testing import CompileCounterWithBackend

from dlcore import attention
from dlcore.attention import KVCache
from dlcore.process import cache, unmask
from dlcore.process.cache import Rows

LAYERS, HEADS, KV_HEADS, DIM, VOCAB, MASK = 2, 4, 2, 8, 24, 23
WIDTH = HEADS * DIM
PROMPT, LENGTHS, CANVAS = torch.tensor([3, 5, 4]), torch.tensor([12, 16, 9]), 16


def weights():
    def matrix(rows, columns, seed):
        return normal(rows, columns, dtype=torch.float32, seed=seed) / rows**0.5

    return SimpleNamespace(
        embed=normal(VOCAB, WIDTH, dtype=torch.float32, seed=1),
        layers=[
            SimpleNamespace(
                q=matrix(WIDTH, HEADS * DIM, 10 + i),
                k=matrix(WIDTH, KV_HEADS * DIM, 20 + i),
                v=matrix(WIDTH, KV_HEADS * DIM, 30 + i),
                out=matrix(HEADS * DIM, WIDTH, 40 + i),
                up=matrix(WIDTH, 2 * WIDTH, 50 + i),
                down=matrix(2 * WIDTH, WIDTH, 60 + i),
            )
            for i in range(LAYERS)
        ],
    )


WEIGHTS = weights()


def rotated(x, position):
    """RoPE of (B, n, H, D) at positions (B, n)."""
    angle = position[..., None, None] * 100.0 ** -torch.linspace(0, 1, DIM // 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def norm(x):
    return torch.nn.functional.rms_norm(x, (WIDTH,))


def heads(x, matrix):
    return (norm(x) @ matrix).unflatten(-1, (-1, DIM))


def fed(x, layer):
    return torch.nn.functional.silu(norm(x) @ layer.up) @ layer.down


def logits(x):
    return norm(x) @ WEIGHTS.embed[:MASK].T


def run_whole(tokens, lengths):
    """The uncached model: logits (B, L, V)."""
    x, position = WEIGHTS.embed[tokens], torch.arange(tokens.shape[1]).expand_as(tokens)
    stops = torch.nn.functional.pad(lengths.view(-1, 1, 1).expand(*tokens.shape, 1), (0, 1)).int()
    for layer in WEIGHTS.layers:
        q, k = (rotated(heads(x, m), position) for m in (layer.q, layer.k))
        seen = attention.intervals(q, k, heads(x, layer.v), torch.zeros_like(stops), stops)
        x = x + seen.flatten(2) @ layer.out
        x = x + fed(x, layer)
    return logits(x)


def run_rows(tokens, rows, kv):
    """The same of some rows (B, n), the others' keys and values as they are cached."""
    x = WEIGHTS.embed[cache.take(tokens, rows)]
    for i, layer in enumerate(WEIGHTS.layers):
        q, k = (rotated(heads(x, m), rows.positions) for m in (layer.q, layer.k))
        x = x + cache.attend(q, k, heads(x, layer.v), kv, i, rows).flatten(2) @ layer.out
        x = x + fed(x, layer)
    return logits(x)


def run_adaptively(tokens, rows, whole, kv, kept, ratio):
    """dLLM-Cache's step: of rows that are not `whole` those whose values changed most."""
    x, picked = WEIGHTS.embed[cache.take(tokens, rows)], []
    for i, layer in enumerate(WEIGHTS.layers):
        v = heads(x, layer.v)
        anew = cache.take(whole, rows) & rows.live
        changed = cache.similarity(v, kv, i, rows)
        slots = cache.rows(anew | cache.least_similar(changed, rows.live & ~anew, ratio))
        at, some = rows.among(slots), cache.take(x, slots)
        kv.scatter(i, rows.positions, None, v, rows.counts)
        q, k = (rotated(heads(some, m), at.positions) for m in (layer.q, layer.k))
        cache.put(kept[i][0], at, cache.attend(q, k, None, kv, i, at).flatten(2) @ layer.out)
        x = x + cache.take(kept[i][0], rows)
        cache.put(kept[i][1], at, fed(cache.take(x, slots), layer))
        x = x + cache.take(kept[i][1], rows)
        picked.append(at)
    return logits(x), picked


def start(prompt=PROMPT, lengths=LENGTHS, canvas=CANVAS, page_size=None, seeds=(0, 1, 2)):
    """Tokens with their prompts, and a cache with room for them."""
    tokens = torch.full((len(prompt), canvas), MASK)
    for b, seed in enumerate(seeds):
        some = torch.randint(MASK, (16,), generator=torch.Generator().manual_seed(seed))
        tokens[b, : prompt[b]] = some[: prompt[b]]
    kv = KVCache(LAYERS, len(prompt), canvas, KV_HEADS, DIM, page_size=page_size)
    for layer in range(LAYERS):
        for x in kv.view(layer):
            x.fill_(torch.nan)
    kv.commit(lengths)
    return tokens, kv


def decide(tokens, rows, scores):
    """Two tokens of each sequence more, the most confident ones; what was decided, (B, L) bool."""
    before = tokens.clone()
    confidence, token = scores.softmax(-1).max(-1)
    chosen = unmask.select(confidence, cache.take(tokens == MASK, rows) & rows.live, top_k=2)
    cache.put(tokens, rows, torch.where(chosen, token, cache.take(tokens, rows)))
    return tokens != before


def policies(prompt, lengths, canvas, every):
    """Masks by name, from the step, its and the last one's input, and what the last one decided."""
    size = 4

    def block(tokens):
        """Where the first block with a mask starts, and whether it is new."""
        position = torch.arange(canvas)
        masked = (tokens == MASK) & (position < lengths.unsqueeze(1))
        first = torch.where(masked, position, canvas).amin(1).clamp(max=lengths - 1)
        return prompt + (first - prompt).clamp(min=0) // size * size

    def fresh(step, tokens, before):
        return (
            torch.ones(len(prompt), dtype=torch.bool)
            if every or step == 0
            else block(tokens) != block(before)
        )

    interval = 1 if every else 4
    position = torch.arange(canvas)

    def soon(tokens):
        """The first two masks, which a left-to-right order decides next."""
        masked = (tokens == MASK) & (position < lengths.unsqueeze(1))
        return masked & (masked.cumsum(1) <= 2)

    return {
        "dkv_decode": lambda step, tokens, before, _: cache.dkv_decode(
            before != MASK, lengths, step, interval=interval
        ),
        "dkv_greedy": lambda step, tokens, before, last: cache.dkv_greedy(
            soon(tokens), last, lengths, step, window=1, interval=interval
        ),
        "prefix_cache": lambda step, tokens, before, _: cache.prefix_cache(
            block(tokens), lengths, canvas, fresh(step, tokens, before)
        ),
        "dual_cache": lambda step, tokens, before, _: cache.dual_cache(
            block(tokens), size, lengths, canvas, fresh(step, tokens, before)
        ),
        "dllm_cache": lambda step, tokens, before, _: cache.dllm_cache(
            prompt, lengths, canvas, step, prompt_interval=interval, response_interval=interval
        ),
    }


NAMES = ["dkv_decode", "dkv_greedy", "prefix_cache", "dual_cache"]


def decode(name, prompt=PROMPT, lengths=LENGTHS, canvas=CANVAS, seeds=(0, 1, 2), every=False, page_size=None):
    """Step by step: tokens before it, the mask of computed rows, logits (NaN elsewhere), what was decided."""
    tokens, kv = start(prompt, lengths, canvas, page_size, seeds)
    policy = policies(prompt, lengths, canvas, every)[name]
    before, last, history = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool), []
    for step in range(7):
        now = tokens.clone()
        mask = policy(step, tokens, before, last)
        rows = cache.rows(mask)
        held = [tuple(x.clone() for x in kv.view(layer)) for layer in range(LAYERS)]
        scores = run_rows(tokens, rows, kv)
        last = decide(tokens, rows, scores)
        whole = torch.full((len(prompt), canvas, MASK), torch.nan)
        cache.put(whole, rows, scores)
        changed = [
            tuple(
                ((x != y) & ~(x.isnan() & y.isnan())).flatten(2).any(2)
                for x, y in zip(kv.view(i), held[i], strict=True)
            )
            for i in range(LAYERS)
        ]
        before = now
        history.append(SimpleNamespace(tokens=now, mask=mask, logits=whole, decided=last, changed=changed))
    return history


@pytest.mark.parametrize("page_size", [None, 5])
@pytest.mark.parametrize("name", NAMES)
def test_refreshing_at_every_step_is_the_uncached_model(name, page_size):
    """To the bit."""
    inside = torch.arange(CANVAS) < LENGTHS.unsqueeze(1)
    for step in decode(name, every=True, page_size=page_size):
        assert torch.equal(step.mask, inside)
        assert torch.equal(step.logits[inside], run_whole(step.tokens, LENGTHS)[inside])
    assert bool((step.tokens != MASK)[2, :9].all())  # the shortest one is done


@pytest.mark.parametrize(("prompt_interval", "response_interval"), [(1, 1), (1, 100)])
def test_dllm_cache_with_every_row_is_the_uncached_model(prompt_interval, response_interval):
    """By the intervals, or by a ratio of 1."""
    tokens, kv = start()
    inside = torch.arange(CANVAS) < LENGTHS.unsqueeze(1)
    kept = torch.full((LAYERS, 2, 3, CANVAS, WIDTH), torch.nan)
    for step in range(5):
        whole = cache.dllm_cache(
            PROMPT,
            LENGTHS,
            CANVAS,
            step,
            prompt_interval=prompt_interval,
            response_interval=response_interval,
        )
        rows = cache.rows(inside)
        want = run_whole(tokens, LENGTHS)
        scores, _ = run_adaptively(tokens, rows, whole, kv, kept, 1.0)
        assert torch.equal(scores[rows.live], want[inside])
        decide(tokens, rows, scores)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_of_a_batch_is_decoded_as_if_alone(name):
    """With its own prompt, length and blocks; public code mixes the rows of a batch."""
    together = decode(name)
    assert any(not bool(step.mask[0, :12].all()) for step in together)
    for b in range(3):
        one = slice(b, b + 1)
        alone = decode(name, PROMPT[one], LENGTHS[one], int(LENGTHS[b]), seeds=(b,))
        for step, other in zip(together, alone, strict=True):
            length = int(LENGTHS[b])
            assert torch.equal(step.tokens[b, :length], other.tokens[0])
            assert torch.equal(step.mask[b, :length], other.mask[0])
            assert not step.mask[b, length:].any()
            torch.testing.assert_close(step.logits[b, :length], other.logits[0], equal_nan=True)


def test_adaptive_steps_of_a_batch():
    """dLLM-Cache: a response flows through the layers, ⌊ρ·n⌋ of its rows are computed, others as kept."""

    def generate(prompt, lengths, canvas, seeds):
        tokens, kv = start(prompt, lengths, canvas, None, seeds)
        kept = torch.full((LAYERS, 2, len(prompt), canvas, WIDTH), torch.nan)
        position, history = torch.arange(canvas), []
        response = (position >= prompt.unsqueeze(1)) & (position < lengths.unsqueeze(1))
        for step in range(5):
            whole = cache.dllm_cache(prompt, lengths, canvas, step, prompt_interval=3, response_interval=2)
            rows = cache.rows(whole | response)
            scores, picked = run_adaptively(tokens, rows, whole, kv, kept, 0.4)
            decide(tokens, rows, scores)
            history.append((tokens.clone(), whole, picked))
        return history

    together = generate(PROMPT, LENGTHS, CANVAS, (0, 1, 2))
    for b in range(3):
        one = slice(b, b + 1)
        alone = generate(PROMPT[one], LENGTHS[one], int(LENGTHS[b]), (b,))
        for (tokens, whole, picked), (tokens_alone, _, picked_alone) in zip(together, alone, strict=True):
            assert torch.equal(tokens[b, : LENGTHS[b]], tokens_alone[0])
            for at, at_alone in zip(picked, picked_alone, strict=True):
                found = at.positions[b, : at.counts[b]].tolist()
                assert found == at_alone.positions[0].tolist()
                n, length = int(whole[b].sum()), int(LENGTHS[b] - PROMPT[b])
                adaptive = 0 if n and whole[b, PROMPT[b]] else int(0.4 * length)
                assert len(found) == n + adaptive


def test_a_delayed_commit_keeps_what_was_decoded_a_step_earlier():
    """What is computed for the last time at a step was decoded by the step before, from a row of a mask."""
    history = decode("dkv_decode")
    for t in (1, 2, 5, 6):  # no refresh
        known = history[t - 1].tokens != MASK
        inside = torch.arange(CANVAS) < LENGTHS.unsqueeze(1)
        assert torch.equal(history[t].mask, inside & ~known)
    for t in (1, 2, 5):  # nor at the next step
        kept = history[t].mask & ~history[t + 1].mask
        assert torch.equal(kept, history[t - 1].decided)
        assert int(kept.sum()) > 0
        assert bool(history[t].changed[0][1][kept].all())  # from the mask's values to the token's


@pytest.mark.parametrize("name", NAMES)
def test_only_the_rows_of_the_mask_are_written(name):
    for step in decode(name)[1:]:
        for changed in step.changed:
            for x in changed:
                assert not (x & ~step.mask).any()


def test_rows_whose_values_changed_are_the_least_similar():
    cached = normal(3, CANVAS, KV_HEADS, DIM, dtype=torch.float32)
    kv = KVCache(LAYERS, 3, CANVAS, KV_HEADS, DIM, page_size=3)
    kv.write(1, torch.zeros_like(cached), cached, start=0)
    kv.commit(LENGTHS)
    inside, position = torch.arange(CANVAS) < LENGTHS.unsqueeze(1), torch.arange(CANVAS)
    moved = torch.zeros(3, CANVAS, dtype=torch.bool)
    for b, at in enumerate(([4, 11], [5, 9, 15], [7])):  # ⌊0.28·n⌋ of 9, 11 and 5 response rows
        moved[b, at] = True
    new = torch.where(moved[..., None, None], cached.roll(1, -1), 3 * cached)  # longer is no change
    new[:, 0] = -cached[:, 0]  # the prompt's rows are no candidates
    rows = cache.rows(inside & (position >= 1))
    response = cache.take(position.expand(3, -1), rows) >= PROMPT.unsqueeze(1)
    similarity = cache.similarity(cache.take(new, rows), kv, 1, rows)
    chosen = cache.least_similar(similarity, rows.live & response, torch.tensor([0.28, 0.28, 0.28]))
    at = rows.among(cache.rows(chosen))
    found = torch.zeros_like(moved)
    cache.put(found, at, torch.ones_like(at.positions, dtype=torch.bool))
    assert torch.equal(found, moved)


def test_least_similar_counts_and_ties():
    similarity = torch.tensor([[0.5, 0.5, torch.nan, 0.5, -1.0]])
    everyone = torch.ones(1, 5, dtype=torch.bool)
    for count, wanted in enumerate([[], [2], [2, 4], [0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]):
        found = cache.least_similar(similarity, everyone, count / 5)
        assert found[0].nonzero().flatten().tolist() == wanted
    assert cache.least_similar(torch.zeros(1, 100), torch.ones(1, 100).bool(), 0.29).sum() == 29
    assert not cache.least_similar(similarity, ~everyone, 1.0).any()


def test_blocks_by_hand():
    start, lengths = torch.tensor([0, 3, 5, 2]), torch.tensor([6, 6, 6, 3])
    fresh = torch.tensor([False, False, False, True])
    prefix = [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0]]
    dual = [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0]]
    assert cache.prefix_cache(start, lengths, 6, fresh).int().tolist() == prefix
    assert cache.dual_cache(start, 2, lengths, 6, fresh).int().tolist() == dual
    assert cache.dual_cache(start, 2, lengths, 6, True).sum(1).tolist() == [6, 6, 6, 3]


@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_a_window_by_hand(window):
    generator = torch.Generator().manual_seed(window)
    upcoming, last = (torch.rand(2, 3, 16, generator=generator) < 0.15).unbind(0)
    found = cache.dkv_greedy(upcoming, last, LENGTHS, torch.tensor([1, 2, 4]), window=window, interval=4)
    for b in range(3):
        for at in range(16):
            near = bool(upcoming[b, max(at - window, 0) : at + window + 1].any())
            wanted = at < LENGTHS[b] and (near or bool(last[b, at]) or b == 2)
            assert bool(found[b, at]) == wanted


def test_intervals():
    prompt, lengths = torch.tensor([1, 2]), torch.tensor([3, 3])

    def at(step):
        return (
            cache.dllm_cache(prompt, lengths, 4, step, prompt_interval=3, response_interval=2).int().tolist()
        )

    assert at(0) == at(6) == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert at(1) == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert at(2) == [[0, 1, 1, 0], [0, 0, 1, 0]]
    assert at(3) == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert at(torch.tensor([2, 3])) == [[0, 1, 1, 0], [1, 1, 0, 0]]
    known = torch.ones(1, 2, dtype=torch.bool)
    assert [bool(cache.dkv_decode(known, torch.tensor([2]), s).any()) for s in range(3)] == [
        True,
        False,
        False,
    ]


def test_rows_and_what_does_not_count():
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    for size in (None, 3, 5, 9):
        rows = cache.rows(mask, size)
        assert rows.positions.tolist() == [
            [1, 3, 4, *[0] * (min(size or 3, 5) - 3)],
            [0] * rows.positions.shape[1],
            [0] * rows.positions.shape[1],
        ]
        assert rows.counts.tolist() == [3, 0, 1]
    x = torch.arange(15.0).view(3, 5)
    rows = cache.rows(mask, 4)
    assert cache.take(x, rows)[0].tolist() == [1, 3, 4, 0]
    values = torch.where(rows.live, -1.0, torch.nan)
    cache.put(x, rows, values)
    assert x.tolist() == [[0, -1, 2, -1, -1], [5, 6, 7, 8, 9], [-1, 11, 12, 13, 14]]
    wide = torch.zeros(3, 2, 5).transpose(1, 2)
    cache.put(wide, rows, values.unsqueeze(-1).expand(3, 4, 2))
    assert torch.equal(wide, torch.where(mask, -1.0, 0.0).unsqueeze(-1).expand(3, 5, 2))
    assert cache.rows(torch.zeros(2, 3, dtype=torch.bool)).positions.shape == (2, 1)


def test_slots_that_do_not_count_give_zero_and_write_nothing():
    tokens, kv = start()
    everything = cache.rows(torch.arange(CANVAS) < LENGTHS.unsqueeze(1))
    run_rows(tokens, everything, kv)
    held = [x.clone() for x in kv.view(0)]
    rows = Rows(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    q, k = normal(3, 4, HEADS, DIM, dtype=torch.float32), torch.full((3, 4, KV_HEADS, DIM), torch.nan)
    assert not cache.attend(q, k, k, kv, 0, rows).any()
    for x, y in zip(kv.view(0), held, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_whole_graphs_that_do_not_recompile():
    """A step with a size for its rows: the same graph at every step, as without one."""

    def step(tokens, before, kv, at):
        rows = cache.rows(cache.dkv_decode(before != MASK, kv.lengths, at, interval=3), CANVAS)
        scores = run_rows(tokens, rows, kv)
        return decide(tokens, rows, scores), scores, rows

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    found, wanted = [], []
    for function, results in ((step, wanted), (compiled, found)):
        tokens, kv = start()
        before = tokens.clone()
        for at in range(5):
            now = tokens.clone()
            chosen, scores, rows = function(tokens, before, kv, torch.tensor(at))
            results.append((tokens.clone(), chosen, scores[rows.live]))
            before = now
    assert counter.frame_count == 1
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        torch.testing.assert_close(a[2], b[2])
