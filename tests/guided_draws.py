"""Guided draws by a GPU's kernel, held against the reference in float64 and the CPU's kernel."""

from __future__ import annotations

import torch
from test_guidance_kernels import ALPHAS, GAMMAS, KEY, OP, ROWS, coefficients, ids, streams
from torch import Tensor
from triton_calls import call

from dlcore import rng

EXCLUDED = 2


def every_kind() -> Tensor:
    """Rows of coefficients (24, 6): each γ with each α_s."""
    each = (torch.tensor(x, dtype=torch.float64) for x in (GAMMAS, ALPHAS))
    gamma, alpha_s = torch.cartesian_prod(*each).unbind(-1)
    return coefficients(ROWS, gamma=gamma, alpha_s=alpha_s, temperature=0.7, shift=-1.2, bonus=1.5)


def check(backend: str, cond: Tensor, uncond: Tensor, z: Tensor, k: Tensor, exclude: int | None) -> Tensor:
    """The draws: for a shared key, which are the reference's and the CPU's, and for one per row."""
    keys = rng.split(KEY, z.shape)
    for key in (KEY, keys):
        args = (z, k, exclude, key)
        (found,) = call(OP, backend, cond, uncond, *args)
        (exact,) = call(OP, "reference", cond, uncond, *args, wide=True)
        assert found.equal(exact)
        assert found.equal(call(OP, "cpu", cond, uncond, *args)[0])
    return found


def check_streams(
    backend: str,
    vocab: int,
    c: torch.dtype = torch.float32,
    u: torch.dtype = torch.float32,
    table: Tensor | None = None,
) -> None:
    """Rows of several coefficients, and of the first one; with and without a token of probability 0."""
    table = every_kind() if table is None else table
    cond, uncond = (x.to(dtype) for x, dtype in zip(streams(vocab, len(table)), (c, u), strict=True))
    for exclude in (None, EXCLUDED) if vocab > EXCLUDED else (None,):
        z = ids(vocab, len(table), exclude)
        drawn = check(backend, cond, uncond, z, table, exclude)
        assert bool((drawn >= 0).all())
        some = slice(0, 4)
        check(backend, cond[some], uncond[some], z[some], table[9 % len(table)], exclude)


def strided_streams(backend: str) -> None:
    """Rows with gaps between them, at addresses that allow loads of every width; leading dimensions that lie
    the other way round, and coefficients that lie apart."""
    for offset in (0, 1, 2, 4):
        vocab, room = 600, [torch.full((2, 3, 608), torch.inf, dtype=torch.bfloat16) for _ in range(2)]
        cond, uncond = (x[:, 1:, offset : offset + vocab] for x in room)
        for x, values in zip((cond, uncond), streams(vocab, 4, seed=offset), strict=True):
            x.copy_(values.view(2, 2, vocab))
        z = ids(vocab, 4).view(2, 2).t()
        k = every_kind()[:12:3].view(2, 2, 6).transpose(0, 1)
        check(backend, cond.transpose(0, 1), uncond, z, k, None)


def broken_streams(backend: str) -> None:
    """Broken in either stream, whatever its weight; what stands at `exclude` is not looked at."""
    for vocab in (5, 700):
        cond, uncond = streams(vocab)
        z, k = ids(vocab, exclude=EXCLUDED), every_kind()
        cond[:, EXCLUDED], uncond[:, EXCLUDED] = torch.inf, torch.nan
        bad = torch.tensor([torch.nan, torch.inf])
        for row in range(0, ROWS, 3):
            (cond if row % 2 else uncond)[row, row % 2 * 3] = bad[row // 6 % 2]
        cond[1], uncond[2] = -torch.inf, -torch.inf
        drawn = check(backend, cond, uncond, z, k, EXCLUDED)
        broken = torch.arange(ROWS) % 3 == 0
        broken[[1, 2]] = True
        assert (drawn < 0).equal(broken)


def kept_rows(backend: str) -> None:
    """What would be broken is not read; some ids are no tokens, and read nowhere."""
    cond, uncond = torch.full((4, 5000), torch.nan), torch.full((4, 5000), torch.inf)
    k = coefficients(4)
    k[[0, 2], -1] = 1
    (drawn,) = call(OP, backend, cond, uncond, torch.tensor([3, 0, 4999, -7]), k, None, KEY)
    assert drawn.tolist() == [3, -1, 4999, -1]
    cond, uncond = streams(5000, 2)
    (drawn,) = call(OP, backend, cond, uncond, torch.tensor([-1, 2**40]), k[1], None, KEY)
    assert bool(((drawn >= 0) & (drawn < 5000)).all())


def impossible_tokens(backend: str) -> None:
    """At α_s = 1 what a stream of non-zero weight excludes is never drawn, below it everything may be."""
    cond, uncond = streams(700)
    generator = torch.Generator().manual_seed(5)
    for x in (cond, uncond):
        x[torch.rand(x.shape, generator=generator) < 0.6] = -torch.inf
    k = every_kind()
    last = k[:, 0].eq(2).logical_and(k[:, 3].eq(1)).nonzero().item()
    cond[last, 350:], uncond[last, :350] = -torch.inf, -torch.inf
    drawn = check(backend, cond, uncond, ids(700), k, None)
    assert drawn[last] == -1
    assert (drawn < 0).sum() == 1
