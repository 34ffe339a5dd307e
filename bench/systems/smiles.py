"""A small language of molecules, part of SMILES, with a generator and a checker that share only its rules.

A string is an atom with its ring digits, its branches in parentheses, and the atom after it; = and # are
double and triple bonds. Hydrogens are implied, so an atom may have fewer bonds than its valence, never more.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

VALENCE = {"C": 4, "N": 3, "O": 2, "S": 2, "F": 1}
BONDS = {"": 1, "=": 2, "#": 3}
RINGS = "12"
#: Behind the end of a string.
PAD = " "
ALPHABET = PAD + "".join(VALENCE) + "=#()" + RINGS

#: A string ends with an atom or its ring.
_ENDS = (*VALENCE, *RINGS)
_SYMBOL = {order: bond for bond, order in BONDS.items()}


@dataclass
class _Atom:
    element: str
    free: int
    parent: int = -1
    bond: int = 1
    children: list[int] = field(default_factory=list)
    rings: str = ""


def generate(count: int, length: int, seed: int) -> list[str]:
    """Valid strings of at most `length` characters, the same for a seed."""
    source = random.Random(seed)
    strings: list[str] = []
    while len(strings) < count:
        written = _write(_grow(source), 0)
        if len(written) <= length:
            strings.append(written)
    return strings


def is_valid(string: str) -> bool:
    """Whether a string, padded or not, follows the rules."""
    string = string.rstrip(PAD)
    if not all(c in _after(before) for before, c in pairwise("=" + string)) or string[-1:] not in _ENDS:
        return False
    bonds, elements = _Bonds(), [c for c in string if c in VALENCE]
    branches: list[int] = []
    rings: dict[str, int] = {}
    last, order, count = -1, 1, 0
    for c in string:
        if c in VALENCE:
            if count:
                bonds.join(last, count, order)
            last, order, count = count, 1, count + 1
        elif c in BONDS:
            order = BONDS[c]
        elif c == "(":
            branches.append(last)
        elif c == ")":
            if not branches:
                return False
            last = branches.pop()
        elif c not in rings:
            rings[c] = last
        elif not bonds.join(rings.pop(c), last, 1):
            return False
    return not branches and not rings and all(bonds.used[i] <= VALENCE[e] for i, e in enumerate(elements))


def _after(before: str) -> str:
    """What may follow a character; before a string there is nothing to bond with, as after a bond."""
    atoms = "".join(VALENCE)
    allowed = {"=": atoms, "#": atoms, "(": atoms + "=#", ")": atoms + "=#("}
    return allowed.get(before, ALPHABET.removeprefix(PAD))


class _Bonds:
    """Which atoms are bonded, and how often each one is."""

    def __init__(self) -> None:
        self.pairs: set[frozenset[int]] = set()
        self.used: Counter[int] = Counter()

    def join(self, a: int, b: int, order: int) -> bool:
        """Bond two atoms; False if they are one, or bonded already."""
        pair = frozenset((a, b))
        if len(pair) < 2 or pair in self.pairs:
            return False
        self.pairs.add(pair)
        self.used.update({a: order, b: order})
        return True


def _grow(source: random.Random) -> list[_Atom]:
    """A tree of atoms, mostly a chain, then rings of five and six."""
    atoms = [_Atom("C", 4)]
    for _ in range(source.randint(3, 9)):
        open_ = [i for i, atom in enumerate(atoms) if atom.free]
        parent = open_[-1] if source.random() < 0.75 else source.choice(open_)
        element = source.choices("CNOSF", (60, 14, 14, 5, 7))[0]
        most = min(atoms[parent].free, VALENCE[element])
        bond = min(source.choices((1, 2, 3), (84, 13, 3))[0], most)
        atoms[parent].free -= bond
        atoms[parent].children.append(len(atoms))
        atoms.append(_Atom(element, VALENCE[element] - bond, parent, bond))
        if not any(atom.free for atom in atoms):
            break
    for digit in RINGS:
        ends = [
            (i, j)
            for i, atom in enumerate(atoms)
            for j in (_above(atoms, i, 4), _above(atoms, i, 5))
            if j >= 0 and atom.free and atoms[j].free and not (atom.rings and atom.rings == atoms[j].rings)
        ]
        if ends and source.random() < 0.6:
            for end in source.choice(ends):
                atoms[end].free -= 1
                atoms[end].rings += digit
    return atoms


def _above(atoms: list[_Atom], i: int, steps: int) -> int:
    """The ancestor so many bonds up, -1 if there is none."""
    for _ in range(steps):
        i = atoms[i].parent if i >= 0 else -1
    return i


def _write(atoms: list[_Atom], i: int) -> str:
    """The string from atom i on: all children but the last are branches."""
    atom = atoms[i]
    parts = [_SYMBOL[atoms[child].bond] + _write(atoms, child) for child in atom.children]
    return atom.element + atom.rings + "".join(f"({part})" for part in parts[:-1]) + "".join(parts[-1:])
