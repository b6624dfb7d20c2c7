"""Words that a mistyped word may have meant: within a small edit distance, found by shared trigrams.

Knows words only; `search` asks it for what it does not find otherwise.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain

LETTERS_FOR_ONE_ERROR, LETTERS_FOR_TWO = 4, 8
"""Shorter words have too many neighbours: `map`, `mail` and `main` are all different things."""

TRIGRAMS_PER_ERROR = 4
"""Two swapped letters change four trigrams, any other single error at most three."""

CANDIDATES_MAX = 48
"""Words whose spelling is compared, those that share most trigrams first; a comparison takes about 5 µs."""

CORRECTIONS_MAX = 4


class Spelling:
    """The known words by their trigrams. Built once."""

    def __init__(self, words: Iterable[str]) -> None:
        self._by_trigram: dict[str, list[str]] = {}
        for word in words:
            for trigram in _trigrams(word):
                self._by_trigram.setdefault(trigram, []).append(word)

    def corrected(self, word: str, frequency: Callable[[str], int]) -> list[str]:
        """Known words with the fewest errors between, the most frequent first; empty when all are too far."""
        errors_max = (len(word) >= LETTERS_FOR_ONE_ERROR) + (len(word) >= LETTERS_FOR_TWO)
        if not errors_max:
            return []
        near: dict[int, list[str]] = {}
        for candidate in self._candidates(word, errors_max):
            near.setdefault(distance(word, candidate, errors_max), []).append(candidate)
        fewest = min(near, default=errors_max + 1)
        if fewest > errors_max:
            return []
        return sorted(near[fewest], key=lambda known: (-frequency(known), known))[:CORRECTIONS_MAX]

    def _candidates(self, word: str, errors_max: int) -> list[str]:
        trigrams = _trigrams(word)
        shared = Counter(chain.from_iterable(self._by_trigram.get(trigram, ()) for trigram in trigrams))
        needed = len(trigrams) - TRIGRAMS_PER_ERROR * errors_max
        likely = (
            known for known, count in shared.items() if count >= needed and abs(len(known) - len(word)) <= errors_max
        )
        return heapq.nlargest(CANDIDATES_MAX, likely, key=shared.__getitem__)


def _trigrams(word: str) -> list[str]:
    padded = f"  {word}  "
    return list(dict.fromkeys(padded[start : start + 3] for start in range(len(word) + 2)))


def distance(a: str, b: str, most: int) -> int:
    """Letters to insert, drop, replace or swap (optimal string alignment); past `most`, it says most + 1."""
    a, b = _without_shared_ends(a, b)
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above, before_that = row, before
        row = [i]
        for j, other in enumerate(b, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before_that[j - 2] + 1)
            row.append(cost)
        if min(row) > most:
            return most + 1
        before = above
    return min(row[-1], most + 1)


def _without_shared_ends(a: str, b: str) -> tuple[str, str]:
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    a, b = a[start:], b[start:]
    end = 0
    while end < min(len(a), len(b)) and a[-1 - end] == b[-1 - end]:
        end += 1
    return a[: len(a) - end], b[: len(b) - end]
