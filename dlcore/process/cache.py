"""Approximate caches of bidirectional models: which rows a step computes anew, and which stay cached.

A masked diffusion model sees its whole sequence, so the keys and values of every row change at every step;
what is published keeps most of them anyway. Here such a policy is a mask (B, L) of the rows whose keys and
values are computed at this step. The model runs on those `rows` alone, `attend` writes what they give into a
`KVCache` and lets them see all of it. Sequence b of a batch has `lengths[b]` positions, a prompt and a
response, and progresses by itself: no row is looked for by its place in the batch.

- `dkv_decode`, `dkv_greedy`: dKV-Cache (Ma et al., arXiv 2505.15781).
- `prefix_cache`, `dual_cache`: Fast-dLLM (Wu et al., arXiv 2505.22618).
- `dllm_cache`, `least_similar`: dLLM-Cache (Liu et al., arXiv 2506.06295).

A mask of all rows makes the very step of the uncached model. Where `rows` is given a size nothing here waits
for a GPU's numbers, and all of it compiles into a whole graph.

Example:
    Two prompts, a random layer, dKV-Cache: the two most confident tokens of each sequence at every step.

    >>> import torch
    >>> from dlcore.attention import KVCache
    >>> from dlcore.process import cache, unmask
    >>> H, D, mask_id = 2, 8, 31
    >>> embed, project = torch.randn(32, H * D), torch.randn(H * D, 3 * H * D) / 4
    >>> prompt, lengths = torch.tensor([3, 5]), torch.tensor([12, 10])
    >>> tokens = torch.where(torch.arange(12) < prompt.unsqueeze(1), 1, mask_id)
    >>> kv = KVCache(num_layers=1, batch=2, max_len=12, num_kv_heads=H, head_dim=D)
    >>> kv.commit(lengths)
    >>> decoded = tokens != mask_id
    >>> for step in range(5):
    ...     rows = cache.rows(cache.dkv_decode(decoded, lengths, step, interval=4))
    ...     decoded, masked = tokens != mask_id, cache.take(tokens == mask_id, rows)
    ...     x = embed[cache.take(tokens, rows)]
    ...     q, k, v = (x @ project).unflatten(-1, (3, H, D)).unbind(2)  # RoPE: at positions rows.positions
    ...     x = x + cache.attend(q, k, v, kv, 0, rows).flatten(2)
    ...     confidence, drawn = (x @ embed[:mask_id].T).softmax(-1).max(-1)
    ...     chosen = unmask.select(confidence, masked & rows.live, top_k=2)
    ...     cache.put(tokens, rows, torch.where(chosen, drawn, cache.take(tokens, rows)))
    >>> (tokens == mask_id).sum(1).tolist()  # the second sequence ends at 10
    [0, 2]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dlcore import _checks as checks
from dlcore import similarity as rows_similarity
from dlcore.attention import KVCache
from dlcore.kv_cache import settled
from dlcore.process import unmask

__all__ = [
    "Rows",
    "attend",
    "dkv_decode",
    "dkv_greedy",
    "dllm_cache",
    "dual_cache",
    "least_similar",
    "prefix_cache",
    "put",
    "rows",
    "similarity",
    "take",
]


class Rows(NamedTuple):
    """Rows of each sequence: the first `counts` (B,) int64 of `positions` (B, n) int64; the rest are 0."""

    positions: Tensor
    counts: Tensor

    @property
    def live(self) -> Tensor:
        """(B, n) bool: what counts."""
        return torch.arange(self.positions.shape[1], device=self.positions.device) < self.counts.unsqueeze(1)

    def among(self, slots: Rows) -> Rows:
        """The positions of some of these rows, `slots` (B, k) counting in n."""
        return Rows(take(self.positions, slots), slots.counts)


def rows(mask: Tensor, size: int | None = None) -> Rows:
    """The positions that `mask` (B, L) bool names, ascending, in `size` slots a sequence.

    Without a size as many as the fullest sequence needs, at least one, which waits for a GPU and can't be
    compiled. With one, ValueError where it is too small; in a compiled graph, and on a GPU unless
    DLCORE_CHECK=1, the first `size` are taken.

    Example:
        >>> import torch
        >>> from dlcore.process import cache
        >>> cache.rows(torch.tensor([[True, False, True], [False, False, True]]))
        Rows(positions=tensor([[0, 2],
                [2, 0]]), counts=tensor([2, 1]))
    """
    op = "cache.rows"
    checks.mask(op, "mask", mask)
    count = mask.sum(1)
    if size is None:
        size = max(1, int(count.max())) if count.numel() else 1
    checks.integer(op, "size", size)
    if size < 0:
        raise ValueError(f"{op}: size must be at least 0, got {size}")
    if checks.reads_data(count) and int(count.max()) > size:
        raise ValueError(f"{op}: size must hold the mask's {int(count.max())} rows, got {size}")
    size = min(size, mask.shape[1])
    # Each position goes to the slot of its rank, what has none to one past the end.
    slot = torch.where(mask, mask.cumsum(1) - 1, size).clamp(max=size)
    position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    index = torch.zeros((mask.shape[0], size + 1), dtype=torch.int64, device=mask.device)
    return Rows(index.scatter_(1, slot, position)[:, :size].contiguous(), count.clamp(max=size))


def take(x: Tensor, rows: Rows) -> Tensor:
    """x (B, L, ...) at the rows: (B, n, ...); slots that don't count hold what position 0 has."""
    _check_rows("cache.take", "x", x, rows)
    return x.gather(1, _like(rows.positions, x).expand(*rows.positions.shape, *x.shape[2:]))


def put(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Overwrite x (B, L, ...) at the rows with `values` (B, n, ...); slots that don't count write nothing.

    Example:
        >>> import torch
        >>> from dlcore.process import cache
        >>> x = torch.zeros(1, 4)
        >>> cache.put(x, cache.Rows(torch.tensor([[3, 0]]), torch.tensor([1])), torch.ones(1, 2))
        >>> x
        tensor([[0., 0., 0., 1.]])
    """
    op = "cache.put"
    _check_rows(op, "x", x, rows)
    wanted = (*rows.positions.shape, *x.shape[2:])
    if not isinstance(values, Tensor) or values.dtype != x.dtype:
        raise TypeError(f"{op}: values must be a {x.dtype} Tensor, got {checks.describe(values)}")
    if values.shape != wanted:
        raise ValueError(f"{op}: values must have shape {wanted}, got {tuple(values.shape)}")
    live = rows.live
    index = settled(rows.positions, live, torch.zeros_like(rows.positions[:, :1]))
    x.scatter_(1, _like(index, x).expand(wanted), settled(values, live, x[:, :1]))


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: KVCache,
    layer: int,
    rows: Rows,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Write the rows' keys and values into the cache, then let the rows see all `cache.lengths` positions.

    q (B, n, Hq, D), k (B, n, Hkv, D), v (B, n, Hkv, Dv), keys as they are to be compared (after RoPE at
    `rows.positions`); k or v None where they have been written. Returns (B, n, Hq, Dv), 0 in slots that don't
    count. No gradients. See `attention.intervals` for scores and errors.
    """
    op = "cache.attend"
    if not isinstance(cache, KVCache):
        raise TypeError(f"{op}: cache must be a KVCache, got {checks.describe(cache)}")
    _check_rows(op, "q", q, rows, of_slots=True)
    keys, values = cache.layer_for(op, layer, k, v)
    if k is not None or v is not None:
        cache.scatter(layer, rows.positions, k, v, rows.counts)
    # A slot that doesn't count sees nothing.
    stops = torch.where(rows.live, cache.lengths.unsqueeze(1), 0)
    stops = F.pad(stops.unsqueeze(-1), (0, 1)).to(torch.int32)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else checks.real(op, "softmax_scale", softmax_scale)
    softcap = checks.real(op, "softcap", softcap, 0)
    bounds = torch.zeros_like(stops), stops
    out: Tensor
    out, _ = torch.ops.dlcore.attention_intervals(
        q.detach(), keys, values, *bounds, cache.page_table, float(scale), float(softcap)
    )
    return out


def dkv_decode(
    decoded: Tensor, lengths: Tensor, step: int | Tensor, *, interval: int | None = None
) -> Tensor:
    """dKV-Cache-Decode: all rows but those that had been decoded one step earlier.

    A token's keys and values are cached one step after it is decoded: the step that decides it still runs on
    the mask, the next one on the token, and only what that one gives is kept.

    Args:
        decoded: (B, L) bool, whose tokens stood in the *previous* step's input already, prompts included.
        lengths: (B,) positions of each sequence; what lies past them is never computed.
        step: of the process, from 0 on; (B,) if the sequences are at different steps.
        interval: every so many steps, from step 0 on, all rows are computed; None: at step 0 only.

    Returns:
        (B, L) bool, the rows to compute.

    Source: Ma et al., "dKV-Cache", arXiv 2505.15781.

    Example:
        >>> import torch
        >>> from dlcore.process import cache
        >>> decoded = torch.tensor([[True, True, False, False]])
        >>> cache.dkv_decode(decoded, torch.tensor([4]), 1).tolist()
        [[False, False, True, True]]
    """
    op = "cache.dkv_decode"
    checks.mask(op, "decoded", decoded)
    inside = _inside(op, lengths, decoded)
    return inside & (~decoded | _due(op, step, interval, inside))


def dkv_greedy(
    upcoming: Tensor,
    last: Tensor,
    lengths: Tensor,
    step: int | Tensor,
    *,
    window: int = 0,
    interval: int | None = None,
) -> Tensor:
    """dKV-Cache-Greedy: the rows decoded at this step and at the last one, and those near the former.

    The order of decoding must be known beforehand, as a random one is.

    Args:
        upcoming: (B, L) bool, the positions that this step decodes.
        last: (B, L) bool, those that the last one decoded.
        lengths: (B,) positions of each sequence.
        step: of the process, from 0 on; (B,) if the sequences are at different steps.
        window: so many positions on either side of an upcoming one are computed, too.
        interval: as in `dkv_decode`.

    Returns:
        (B, L) bool, the rows to compute.

    Source: Ma et al., "dKV-Cache", arXiv 2505.15781; its code takes the nearest masks as the window.

    Example:
        >>> import torch
        >>> from dlcore.process import cache
        >>> upcoming, last = torch.eye(6, dtype=torch.bool)[[4, 0]].unsqueeze(1)
        >>> cache.dkv_greedy(upcoming, last, torch.tensor([6]), 1, window=1).int().tolist()
        [[1, 0, 0, 1, 1, 1]]
    """
    op = "cache.dkv_greedy"
    checks.mask(op, "upcoming", upcoming)
    checks.mask(op, "last", last, upcoming.shape)
    checks.integer(op, "window", window)
    if window < 0:
        raise ValueError(f"{op}: window must be at least 0, got {window}")
    inside = _inside(op, lengths, upcoming)
    # In a channel of its own for each sequence: the largest of a neighbourhood.
    near = F.max_pool1d(upcoming.float(), 2 * window + 1, stride=1, padding=window) > 0
    return inside & (near | last | _due(op, step, interval, inside))


def prefix_cache(start: Tensor, lengths: Tensor, max_len: int, fresh: bool | Tensor = False) -> Tensor:
    """Fast-dLLM's prefix cache: the block being decoded and all that follows it.

    Args:
        start: (B,) int64, where each sequence's block starts.
        lengths: (B,) positions of each sequence.
        max_len: L, at least every length.
        fresh: whether a block begins at this step, when all rows are computed; bool, or (B,) bool.

    Returns:
        (B, L) bool, the rows to compute.

    Source: Wu et al., "Fast-dLLM", arXiv 2505.22618.

    Example:
        >>> import torch
        >>> from dlcore.process import cache
        >>> cache.prefix_cache(torch.tensor([2, 4]), torch.tensor([4, 5]), 5).int().tolist()
        [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    """
    return _block("cache.prefix_cache", start, None, lengths, max_len, fresh)


def dual_cache(
    start: Tensor, block_size: int, lengths: Tensor, max_len: int, fresh: bool | Tensor = False
) -> Tensor:
    """Fast-dLLM's dual cache: the block being decoded, [start, start + block_size); see `prefix_cache`.

    Example:
        >>> import torch
        >>> from dlcore.process import cache
        >>> cache.dual_cache(torch.tensor([1, 4]), 2, torch.tensor([4, 5]), 5).int().tolist()
        [[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]
    """
    op = "cache.dual_cache"
    checks.integer(op, "block_size", block_size)
    if block_size < 1:
        raise ValueError(f"{op}: block_size must be at least 1, got {block_size}")
    return _block(op, start, block_size, lengths, max_len, fresh)


def dllm_cache(
    prompt: Tensor,
    lengths: Tensor,
    max_len: int,
    step: int | Tensor,
    *,
    prompt_interval: int,
    response_interval: int,
) -> Tensor:
    """dLLM-Cache: the rows that are computed whole, prompts and responses each at an interval of their own.

    At other steps the response goes through the layers with the attention and feed-forward outputs of earlier
    steps, kept by the model; each layer projects the values of all of its rows, and computes anew those that
    have changed most. One layer, with `whole` this mask and `flowing` the rows of it and of the response::

        rows = cache.rows(flowing, size)
        q, k, v = ...  # of x (B, n, ...); q and k are wanted of the chosen ones alone
        changed = cache.similarity(v, kv, layer, rows)
        anew = cache.take(whole, rows) & rows.live
        anew = anew | cache.least_similar(changed, rows.live & ~anew, ratio=0.25)
        slots = cache.rows(anew, most)
        at = rows.among(slots)
        kv.scatter(layer, rows.positions, None, v, rows.counts)
        out = cache.attend(cache.take(q, slots), cache.take(k, slots), None, kv, layer, at)
        cache.put(attention_outputs[layer], at, out)
        x = x + cache.take(attention_outputs[layer], rows)  # the feed-forward likewise

    Args:
        prompt, lengths: (B,) positions of each prompt, and of prompt and response together.
        max_len: L, at least every length.
        step: of the process, from 0 on; (B,) if the sequences are at different steps.
        prompt_interval, response_interval: K_p and K_r, at least 1; step 0 computes all rows.

    Returns:
        (B, L) bool, the rows to compute.

    Source: Liu et al., "dLLM-Cache", arXiv 2506.06295; as in its code all of a response's values
    are written, keys of the chosen rows only.

    Example:
        >>> import torch
        >>> from dlcore.process import cache
        >>> for step in range(3):
        ...     cache.dllm_cache(
        ...         torch.tensor([1]), torch.tensor([3]), 3, step, prompt_interval=4, response_interval=2
        ...     ).int().tolist()
        [[1, 1, 1]]
        [[0, 0, 0]]
        [[0, 1, 1]]
    """
    op = "cache.dllm_cache"
    position = _positions(op, max_len, lengths)
    inside = position < _per_sequence(op, "lengths", lengths, lengths, 0, max_len)
    asked = position < _per_sequence(op, "prompt", prompt, lengths, 0, max_len)
    prompt_due = _due(op, step, prompt_interval, inside, "prompt_interval")
    response_due = _due(op, step, response_interval, inside, "response_interval")
    return inside & torch.where(asked, prompt_due, response_due)


def similarity(values: Tensor, cache: KVCache, layer: int, rows: Rows) -> Tensor:
    """The cosine between new values (B, n, H, Dv) of the rows and what the cache holds of them: (B, n).

    Read in place; see `dlcore.similarity.cosine`. Slots that don't count hold some number.
    """
    op = "cache.similarity"
    if not isinstance(cache, KVCache):
        raise TypeError(f"{op}: cache must be a KVCache, got {checks.describe(cache)}")
    _check_rows(op, "values", values, rows, of_slots=True)
    _, held = cache.layer_for(op, layer, None, values)
    return rows_similarity.cosine(values, held, rows.positions, page_table=cache.page_table)


def least_similar(similarity: Tensor, candidates: Tensor, ratio: float | Tensor) -> Tensor:
    """The ⌊ratio · n⌋ of the n candidates of each sequence with the lowest similarity: (B, S) bool.

    Args:
        similarity: (B, S) floating, as `similarity` gives it; NaN counts as the lowest.
        candidates: (B, S) bool.
        ratio: ρ in [0, 1], or (B,).

    Source: Liu et al., "dLLM-Cache", arXiv 2506.06295.

    Example:
        >>> import torch
        >>> from dlcore.process import cache
        >>> cosine, candidates = torch.tensor([[0.9, -0.3, 0.5, 1.0]]), torch.ones(1, 4, dtype=torch.bool)
        >>> cache.least_similar(cosine, candidates, 0.5)
        tensor([[False,  True,  True, False]])
    """
    op = "cache.least_similar"
    checks.floating(op, "similarity", similarity)
    checks.mask(op, "candidates", candidates, similarity.shape)
    share = checks.number(op, "ratio", ratio, candidates.shape[:1], candidates.device)
    checks.within(op, "ratio", share, 0, 1)
    # A ratio such as 0.29 of 100 rows is 29 of them, though its product with 100 is less.
    count = torch.floor(share * candidates.sum(1) + 1e-6).to(torch.int64)
    return unmask.largest(op, "ratio", count, -similarity.nan_to_num(-torch.inf), candidates)


def _like(index: Tensor, x: Tensor) -> Tensor:
    return index.reshape(*index.shape, *[1] * (x.dim() - 2))


def _check_rows(op: str, name: str, x: object, rows: object, of_slots: bool = False) -> None:
    """Rows of x (B, L, ...), or x (B, n, ...) in slots."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {checks.describe(x)}")
    if not isinstance(rows, Rows):
        raise TypeError(f"{op}: rows must be Rows, got {checks.describe(rows)}")
    checks.tokens(op, "rows.positions", rows.positions)
    wanted = rows.positions.shape if of_slots else rows.positions.shape[:1]
    if rows.positions.dim() != 2 or x.dim() < 2 or x.shape[: len(wanted)] != wanted:
        got = f"{tuple(rows.positions.shape)} for {tuple(x.shape)}"
        wanted_x = f"{name} (B, {'n' if of_slots else 'L'}, ...)"
        raise ValueError(f"{op}: rows.positions must be (B, n) for {wanted_x}, got {got}")
    checks.tokens(op, "rows.counts", rows.counts, rows.positions.shape[:1])
    if not of_slots:
        checks.token_range(op, "rows.positions", rows.positions, x.shape[1])


def _per_sequence(
    op: str, name: str, value: Tensor, like: Tensor, low: float, high: float = torch.inf
) -> Tensor:
    """(B, 1) int64, on the device of `like` (B,)."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be an int32 or int64 Tensor, got {checks.describe(value)}")
    if value.dim() != 1 or value.shape != like.shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(like.shape)}, got {tuple(value.shape)}")
    checks.value_range(op, name, value, low, high)
    return value.to(device=like.device, dtype=torch.int64).unsqueeze(1)


def _inside(op: str, lengths: Tensor, mask: Tensor) -> Tensor:
    """(B, L) bool, like `mask`: the positions that a sequence has."""
    like = mask.new_empty(mask.shape[:1])
    position = torch.arange(mask.shape[1], device=mask.device)
    return position < _per_sequence(op, "lengths", lengths, like, 0, mask.shape[1])


def _positions(op: str, max_len: int, like: Tensor) -> Tensor:
    checks.integer(op, "max_len", max_len)
    if max_len < 1:
        raise ValueError(f"{op}: max_len must be at least 1, got {max_len}")
    if not isinstance(like, Tensor):
        raise TypeError(f"{op}: lengths must be an int32 or int64 Tensor, got {checks.describe(like)}")
    return torch.arange(max_len, device=like.device)


def _due(op: str, step: int | Tensor, interval: int | None, inside: Tensor, name: str = "interval") -> Tensor:
    """(B or 1, 1) bool: whether all rows are computed at this step."""
    at = checks.per_row(op, "step", step, inside.shape[:1], inside.device, torch.int64)
    if at is None:
        raise TypeError(f"{op}: step must be an int or an integer Tensor, got None")
    checks.value_range(op, "step", at, 0)
    at = at.reshape(-1, 1)
    if interval is None:
        return at == 0
    checks.integer(op, name, interval)
    if interval < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {interval}")
    return at % interval == 0


def _block(
    op: str, start: Tensor, block_size: int | None, lengths: Tensor, max_len: int, fresh: bool | Tensor
) -> Tensor:
    position = _positions(op, max_len, lengths)
    inside = position < _per_sequence(op, "lengths", lengths, lengths, 0, max_len)
    first = _per_sequence(op, "start", start, lengths, 0)
    chosen = position >= first
    if block_size is not None:
        chosen = chosen & (position < first + block_size)
    if isinstance(fresh, Tensor):
        if fresh.dtype != torch.bool or fresh.shape != lengths.shape:
            wanted = f"a bool or a bool Tensor {tuple(lengths.shape)}"
            raise ValueError(f"{op}: fresh must be {wanted}, got {checks.describe(fresh)}")
        chosen = chosen | fresh.to(chosen.device).unsqueeze(1)
    elif not isinstance(fresh, bool):
        raise TypeError(f"{op}: fresh must be a bool or a bool Tensor, got {checks.describe(fresh)}")
    elif fresh:
        chosen = torch.ones_like(chosen)
    return inside & chosen
