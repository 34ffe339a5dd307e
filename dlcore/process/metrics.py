"""What samples are worth: generative perplexity under a judge, and token entropy. Report both.

Each alone is easily fooled. Repeating one likely phrase gives a perplexity near 1 and an entropy near 0;
uniform noise has the highest entropy of all. Sampling in low precision (float32 Gumbel noise that is cut off
at 16.6, say), a temperature below 1 and truncation lower both, so a perplexity without its entropy compares
nothing. Numbers of different judges, contexts, lengths or weightings do not compare either.

Sources: MDLM, arXiv 2406.07524; Duo, arXiv 2506.10892; SDTT, arXiv 2410.21035.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows

__all__ = ["GenerativePerplexity", "generative_perplexity", "token_entropy"]

Logits = Tensor | LinearLogits
AVERAGES = ("token", "sequence")


class GenerativePerplexity:
    """exp of the mean cross-entropy that an autoregressive judge gives to samples, over batches.

    Token i + 1 is scored given the tokens up to i, so the first of each row is not. Its weight is
    1 if it is no end-of-sequence token or if it is the first one of its row, else 0: padding with
    end-of-sequence tokens counts once, but tokens that follow the first one do count. The two averages:

    - "token", MDLM's and Duo's: exp(Σ w·nll / Σ w) over all rows;
    - "sequence", SDTT's: exp of the mean over rows of Σ w·nll / Σ w (there with eos_id=None, all weights 1);
      rows without weight do not count.

    Pitfalls. The judge must read its own tokens: samples of another tokenizer are decoded and tokenized
    again, which changes their length, and the published numbers do so even where tokenizers agree, cutting
    what exceeds the context. Where the judge begins rows with its end-of-sequence token (as GPT-2 does), a
    row that starts with it has had its first one, and the next weighs 0. Public code drops the last
    incomplete batch and sums in float32; here every row counts and sums are float64.

    Args:
        eos_id: the end-of-sequence token; None weighs all tokens 1.
        average: "token" or "sequence".

    Raises:
        TypeError, ValueError: eos_id is no id, an unknown average.

    Example:
        >>> import torch
        >>> from dlcore.process import metrics
        >>> judge = metrics.GenerativePerplexity()
        >>> judge.update(torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64))
        >>> round(judge.compute(), 4)
        8.0
    """

    def __init__(self, eos_id: int | None = None, *, average: str = "token") -> None:
        op = "metrics.GenerativePerplexity"
        if eos_id is not None:
            checks.integer(op, "eos_id", eos_id)
        checks.option(op, "average", average, AVERAGES)
        self.eos_id, self.average = eos_id, average
        self._total: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0

    def update(self, logits: Logits, tokens: Tensor) -> None:
        """Count rows of tokens (B, L), L >= 2, that the judge read: logits (B, L, V), at i those of i + 1.

        Of `LinearLogits` the cross-entropy streams: nothing of size (B, L, V) is made. Without gradient, and
        without waiting for a device.
        """
        op = "metrics.GenerativePerplexity.update"
        h = categorical.head(op, logits)
        rows.tokens(op, "tokens", tokens, h)
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ValueError(f"{op}: tokens must be (B, L), L >= 2, got {tuple(tokens.shape)}")
        with torch.no_grad():
            scored = rows.take(logits, (slice(None), slice(None, -1)))
            nll = categorical.cross_entropy(scored, tokens[:, 1:]).double()
            weight = self._weights(tokens)[:, 1:].double()
            # An impossible token of weight 0 costs nothing.
            lost, counted = torch.where(weight > 0, nll, 0).sum(-1), weight.sum(-1)
            if self.average == "sequence":
                lost, counted = lost / counted.clamp(min=1), (counted > 0).double()
            self._total = self._total + lost.sum()
            self._weight = self._weight + counted.sum()

    def _weights(self, tokens: Tensor) -> Tensor:
        if self.eos_id is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        ends = tokens == self.eos_id
        return ~ends | (ends.cumsum(-1) == 1)

    def compute(self) -> float:
        """The perplexity so far; NaN before the first weight."""
        return float(torch.as_tensor(self._total).double().div(self._weight).exp())


def generative_perplexity(
    model: Callable[[Tensor], Logits],
    tokens: Tensor,
    *,
    eos_id: int | None = None,
    average: str = "token",
    context: int | None = None,
    batch_size: int = 16,
) -> float:
    """Generative perplexity of tokens under an autoregressive model: `GenerativePerplexity` in batches.

    Args:
        model: the judge, (n, l) int64 tokens -> (n, l, V) logits, at i those of token i + 1; a Tensor or
            `LinearLogits` (hidden states and the head's weight), of which the cross-entropy streams.
        tokens: (B, L) int64 samples in the judge's tokens, L at least 2.
        eos_id, average: as in `GenerativePerplexity`.
        context: rows longer than this are cut into pieces of it, each scored by itself (so the first token of
            each piece is not scored, and the first end-of-sequence token is the piece's), as published code
            does at 1,024. A last piece of one token is left out. None scores rows whole.
        batch_size: rows per call; the last batch may be smaller and counts too.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, context below 2, batch_size below 1.

    Example:
        >>> import torch
        >>> from dlcore.process import metrics
        >>> samples = torch.zeros(3, 6, dtype=torch.int64)
        >>> round(metrics.generative_perplexity(lambda x: torch.zeros(*x.shape, 4), samples), 4)
        4.0
    """
    op = "metrics.generative_perplexity"
    checks.tokens(op, "tokens", tokens)
    checks.sequences(op, "tokens", tokens)
    length = tokens.shape[1] if context is None else context
    for name, value, least in (("context", length, 2), ("batch_size", batch_size, 1)):
        checks.integer(op, name, value)
        if value < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    judge = GenerativePerplexity(eos_id, average=average)
    with torch.no_grad():
        for piece in tokens.split(length, dim=1):
            if piece.shape[1] > 1:
                for batch in piece.split(batch_size):
                    judge.update(model(batch), batch)
    return judge.compute()


def token_entropy(tokens: Tensor) -> Tensor:
    """Entropy of each sample's own token counts, H = -Σ_v (n_v/L)·ln(n_v/L), in nats.

    The field reports its mean over samples. It is at most ln L (6.93 at 1,024), far below that of the corpus
    for short samples, so compare equal lengths alone; real text is the reference, not the maximum. Padding
    counts as tokens. By one sort per row, without a loop or a table of size V.

    Args:
        tokens: (..., L) integer ids of any vocabulary, L at least 1.

    Returns:
        (...) float64, nats.

    Raises:
        TypeError: tokens are not int64. ValueError: L is 0.

    Source:
        the sample entropy of arXiv 2409.02908 and Duo, arXiv 2506.10892.

    Example:
        >>> import torch
        >>> from dlcore.process import metrics
        >>> metrics.token_entropy(torch.tensor([[0, 0, 1, 2], [5, 5, 5, 5]]))
        tensor([1.0397, 0.0000], dtype=torch.float64)
    """
    op = "metrics.token_entropy"
    checks.tokens(op, "tokens", tokens)
    if tokens.dim() < 1 or tokens.shape[-1] < 1:
        raise ValueError(f"{op}: tokens must be (..., L), L >= 1, got {tuple(tokens.shape)}")
    ordered = tokens.sort(-1).values
    new = torch.ones_like(ordered)
    new[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).long()
    counts = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    counts = counts.scatter_add(-1, new.cumsum(-1) - 1, torch.ones_like(counts))
    entropy: Tensor = torch.special.entr(counts / tokens.shape[-1]).sum(-1)
    return entropy
