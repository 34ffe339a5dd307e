"""Masked diffusion of molecules: strings of a small grammar instead of text."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.systems import smiles
from bench.systems.mdlm import MDLM
from bench.systems.sequences import Outcome, main
from bench.systems.training import Data

#: Strings, and the characters of each with its padding.
COUNT, LENGTH = 20_000, 24


class Molecules(MDLM):
    """MDLM as it is; a string's end is learnt as padding."""

    name = "molecules"
    title = "masked diffusion of molecules"


def read(count: int = COUNT) -> Data:
    """`count` strings of the grammar."""
    strings = smiles.generate(count, LENGTH, seed=0)
    rows = [[smiles.ALPHABET.index(c) for c in string.ljust(LENGTH, smiles.PAD)] for string in strings]
    return Data(torch.tensor(rows), len(smiles.ALPHABET))


def decode(tokens: Tensor) -> list[str]:
    """Strings without their padding."""
    return ["".join(smiles.ALPHABET[i] for i in row).rstrip(smiles.PAD) for row in tokens.tolist()]


def report(outcome: Outcome) -> str:
    """How many are valid, differ from each other, and are none of training's."""
    strings = decode(outcome.tokens)
    valid = [string for string in strings if smiles.is_valid(string)]
    distinct = set(valid)
    novel = distinct - set(decode(outcome.data.training))
    return (
        "\n".join(strings[:8])
        + f"\nvalid {len(valid) / len(strings):.1%}; of these distinct {_share(distinct, valid)}, "
        + f"of those novel {_share(novel, distinct)}"
    )


def _share(part: set[str], whole: list[str] | set[str]) -> str:
    return f"{len(part) / max(len(whole), 1):.1%}"


if __name__ == "__main__":
    main(Molecules, read, report)
