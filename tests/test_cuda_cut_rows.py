"""Where a truncated draw of whole rows ends, on the CUDA kernel: what is kept, entry by entry."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from triton_calls import moved, quiet

from dlcore.reference import categorical as reference

pytestmark = [quiet, pytest.mark.usefixtures("cuda_kernels", "guarded")]

#: More entries than shared memory holds, and rows that begin at different alignments.
VOCAB = 9003
KINDS = {
    "flat": lambda x: x,
    "peaked": lambda x: torch.where(x > 2.5, 4 * x, x),
    "within an octave": lambda x: x / 4 + 25,
    "coarse": lambda x: (2 * x).round(),
    "signed zeros": lambda x: torch.where(x > 1, x, 0 * x),
    "equal": lambda x: torch.full_like(x, -3.0),
}
#: A count that threads' largest bound, ones that they do not, one beyond what is held; masses; both.
LIMITS = [(1, None), (300, None), (2000, None), (5000, None), (None, 0.0), (None, 0.3), (None, 0.97)]
LIMITS += [(300, 0.5), (5000, 0.9), (20_000, 1.0)]


def kept(x: torch.Tensor, *limits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries the kernel keeps, and the reference: one has a bonus, one is excluded."""
    from dlcore.cpu.categorical import Softmax
    from dlcore.cuda import categorical

    index, shift = torch.tensor([7, 5000]), torch.tensor([0.5, 1.5])
    y = reference.transform(x.float(), index, shift, None, None, 11)
    expected = ~reference.truncate(y.double(), *limits, None).isneginf()
    x, index, shift, *limits = moved((x, index, shift, *limits), DEVICE)
    head = (x, None, None)
    softmax = Softmax(head, index, shift, None, None, 11)
    cuts, ends = categorical._cuts(head, softmax, categorical.scan(head, softmax), *limits, None)
    threshold = cuts.cpu().view(len(x), -1)[:, :4].contiguous().view(torch.float32)
    found = (y > threshold) | (y == threshold) & (torch.arange(VOCAB) < ends.cpu().unsqueeze(-1))
    return found & ~y.isneginf(), expected & ~y.isneginf()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept(kind, dtype):
    x = KINDS[kind](torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(5))).to(dtype)
    for most, share in LIMITS:
        top_k = None if most is None else torch.full((2,), most)
        top_p = None if share is None else torch.tensor([share, share / 2 + 0.4])
        found, expected = kept(x, top_k, top_p)
        # A mass that meets its limit but for rounding may fall on either side.
        assert (found != expected).sum(-1).max() <= (share is not None), (most, share)
