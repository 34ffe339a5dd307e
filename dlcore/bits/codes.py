"""Tokens as bits, and back: orders, Gray codes, rankings."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)
from dlcore._ops.bits import MAX_WIDTH

CODINGS = {"01": (0.0, 1.0), "pm1": (-1.0, 1.0)}
ORDERS = ("msb", "lsb")


def values_of(op: str, coding: str) -> tuple[float, float]:
    """What a clear and a set bit are."""
    checks.option(op, "coding", coding, tuple(CODINGS))
    return CODINGS[coding]


def _width(op: str, width: int) -> None:
    checks.integer(op, "width", width)
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{op}: width must lie in [1, {MAX_WIDTH}], got {width}")


def _ranking(op: str, ranking: Tensor | None, width: int, device: torch.device) -> None:
    """A permutation of [0, V) with V <= 2^width."""
    if ranking is None:
        return
    checks.tokens(op, "ranking", ranking, device=device)
    if ranking.dim() != 1 or not 1 <= ranking.shape[0] <= 2**width:
        raise ValueError(f"{op}: ranking must be (V,) with V in [1, 2^{width}], got {tuple(ranking.shape)}")
    checks.token_range(op, "ranking", ranking, ranking.shape[0])
    if checks.reads_data(ranking) and int(torch.bincount(ranking).max()) > 1:
        raise ValueError(f"{op}: ranking must be a permutation, got a rank twice")


def encode(
    tokens: Tensor,
    width: int,
    *,
    order: str = "msb",
    gray: bool = False,
    coding: str = "01",
    ranking: Tensor | None = None,
) -> Tensor:
    """The bits of tokens. Returns (..., width) float32.

    Args:
        tokens: (...) int64 in [0, 2^width), or in [0, V) with a ranking.
        width: bits per token, 1 to 62.
        order: the most ("msb": CoBit) or the least significant bit first ("lsb": Analog Bits).
        gray: write the Gray code n ^ (n >> 1), in which neighbours differ in one bit.
        coding: bits are {0, 1} ("01") or {-1, 1} ("pm1").
        ranking: (V,) int64, a permutation: the rank of each token in a semantic order. The code is then that
            of the rank; with `gray` it is CoBit's "semantic" code, in which like tokens have like bits.

    Raises:
        TypeError: dtypes. ValueError: width, a token out of range, a ranking that is no permutation.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> bits.encode(torch.tensor([5, 2]), 3)
        tensor([[1., 0., 1.],
                [0., 1., 0.]])
    """
    op = "bits.encode"
    checks.tokens(op, "tokens", tokens)
    _width(op, width)
    checks.option(op, "order", order, ORDERS)
    low, high = values_of(op, coding)
    _ranking(op, ranking, width, tokens.device)
    checks.token_range(op, "tokens", tokens, 2**width if ranking is None else ranking.shape[0])
    if ranking is not None:
        tokens = ranking[tokens]
    written: Tensor = torch.ops.dlcore.bits_encode(tokens, width, order == "msb", gray, low, high)
    return written


def decode(
    bits_or_probs: Tensor,
    *,
    vocab_size: int | None = None,
    order: str = "msb",
    gray: bool = False,
    coding: str = "01",
    ranking: Tensor | None = None,
) -> Tensor:
    """The tokens of bits: the inverse of `encode`. Returns (...) int64.

    Args:
        bits_or_probs: (..., w), w up to 62. A bit is set above 1/2 ("01": bits, noisy bits or probabilities)
            or above 0 ("pm1"). The probs of `step` and `posterior` are "01" whatever coding those were given.
        vocab_size: V: the 2^w - V codes without a token wrap around, n mod V (CoBit's raw_binary); None: no
            code does. With a ranking it is the ranking's length.
        order, gray, coding, ranking: as in `encode`.

    Returns:
        int64; -1 for a token with a NaN bit.

    Raises:
        TypeError: dtypes. ValueError: more than 62 bits, vocab_size, ranking.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> bits.decode(torch.tensor([[0.9, 0.2, 0.6], [1.0, 1.0, 1.0]]), vocab_size=6)
        tensor([5, 1])
    """
    op = "bits.decode"
    checks.floating(op, "bits_or_probs", bits_or_probs)
    width = bits_or_probs.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"{op}: bits_or_probs must be (..., w) with w at most {MAX_WIDTH}, got {width}")
    checks.option(op, "order", order, ORDERS)
    threshold = sum(values_of(op, coding)) / 2
    _ranking(op, ranking, width, bits_or_probs.device)
    if vocab_size is not None:
        checks.integer(op, "vocab_size", vocab_size)
        if not 1 <= vocab_size <= 2**width:
            raise ValueError(f"{op}: vocab_size must lie in [1, 2^{width}], got {vocab_size}")
        if ranking is not None and vocab_size != ranking.shape[0]:
            raise ValueError(f"{op}: vocab_size must be the ranking's {ranking.shape[0]}, got {vocab_size}")
    vocab = vocab_size if ranking is None else ranking.shape[0]
    read: Tensor = torch.ops.dlcore.bits_decode(bits_or_probs, order == "msb", gray, threshold, vocab or 0)
    if ranking is None:
        return read
    inverse = torch.empty_like(ranking).scatter(0, ranking, torch.arange(len(ranking), device=ranking.device))
    return torch.where(read < 0, read, inverse[read.clamp(min=0)])


def patch(x: Tensor, width: int) -> Tensor:
    """A bitstream (..., L·width) as one row per token (..., L, width), without a copy.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> bits.patch(torch.zeros(2, 12), 3).shape
        torch.Size([2, 4, 3])
    """
    op = "bits.patch"
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError(f"{op}: x must be a Tensor (..., n), got {checks.describe(x)}")
    checks.integer(op, "width", width)
    if width < 1 or x.shape[-1] % width:
        raise ValueError(f"{op}: width must divide x's last dimension {x.shape[-1]}, got {width}")
    return x.view(*x.shape[:-1], x.shape[-1] // width, width)


def unpatch(x: Tensor) -> Tensor:
    """The inverse of `patch`: (..., L, w) -> (..., L·w).

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> bits.unpatch(torch.zeros(2, 4, 3)).shape
        torch.Size([2, 12])
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise TypeError(f"bits.unpatch: x must be a Tensor (..., L, w), got {checks.describe(x)}")
    return x.flatten(-2)
