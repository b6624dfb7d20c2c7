"""Finding tools by words: a ranked index over id, name, tags and description, immutable once built.

Scores as BM25F does (Robertson, Zaragoza, Taylor 2004): one saturating count of a word over weighted fields.
Forgives plurals, unfinished words and typing errors; `spelling` has the latter. Knows no caller; the registry
says who may see what. Why this and no library: docs/adr/0006-tool-search-index.md.
"""

from __future__ import annotations

import heapq
import math
import re
import unicodedata
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from app.tools.spelling import Spelling

ToolFields = tuple[str, str, str, Sequence[str]]
"""Id, name, description, tags."""

Filter = Collection[str] | Callable[[str], bool]

QUERY_CHARACTERS_MAX = 256
QUERY_WORDS_MAX = 8
"""Distinct ones; with POSTINGS_READ_MAX it bounds the time of a search."""

FIELD_CHARACTERS_MAX = 4_000
"""Of one field of one tool; a longer description is found by its beginning."""

WORD_CHARACTERS_MAX = 64
"""As long as an id; compared by its beginning beyond that."""

POSTINGS_READ_MAX = 12_000
"""Pairs of word and tool that one search adds up, rarest word first: about 2 ms."""

ID_WEIGHT, NAME_WEIGHT, TEXT_WEIGHT, TAGS_WEIGHT = 4.0, 4.0, 1.0, 3.0
SATURATION = 1.2
LENGTH_NORM = 0.5
"""BM25's k1 and b: the usual 1.2, and milder than the usual 0.75, as descriptions of tools are short anyway."""

EXACT, RELATED, CORRECTED = 1.0, 0.6, 0.5
"""What a match counts that is the word itself, begins with it or is its beginning, or is only near it."""

COMPLETED_LETTERS_MIN = 2
COMPLETIONS_MAX = 16
SHORTENED_LETTERS_MIN = 4
SHORTENED_SHARE_MIN = 0.6
"""`searching` finds `search`, but `terminal` does not find `term`."""

COMMON_SHARE = 0.2
COMMON_TOOLS_MIN = 20
"""A word of more tools than this only ranks what rarer words have found."""

# fmt: off
_STOP_WORDS = frozenset({
    "a", "an", "and", "any", "are", "as", "at", "be", "by", "can", "do", "for", "from", "how", "i", "in", "into",
    "is", "it", "me", "my", "of", "on", "or", "please", "some", "that", "the", "this", "to", "want", "what",
    "which", "with",
})
# fmt: on
"""Not looked for beside other words."""

_WORD = re.compile(r"[^\W_]+")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class _Postings(NamedTuple):
    """The tools that have a word and how much they have of it, most first, equals by id."""

    tools: array[int]
    counts: array[float]


_Terms = dict[str, float]
"""Words of the index that one word of a query stands for, and what a match with each counts."""


class SearchIndex:
    """Built once from all tools, then only read; safe to share between threads."""

    def __init__(self, documents: Iterable[ToolFields]) -> None:
        tools = sorted(documents, key=lambda fields: fields[0])
        self._ids = [fields[0] for fields in tools]
        self._by_folded_id: dict[str, list[int]] = {}
        for tool, tool_id in enumerate(self._ids):
            self._by_folded_id.setdefault(tool_id.casefold(), []).append(tool)
        self._postings = _postings(tools)
        self._words = sorted(self._postings)
        self._spelling = Spelling(self._words)
        self._common = max(COMMON_TOOLS_MIN, int(len(tools) * COMMON_SHARE))

    def __len__(self) -> int:
        return len(self._ids)

    def search(self, query: str, candidates: Filter | None, limit: int) -> list[str]:
        """Ids of at most `limit` tools that match and that `candidates` has, best first, equals by id.

        A tool whose id is the query comes first. A query without a word has all tools in the order of their ids.
        """
        query = query[:QUERY_CHARACTERS_MAX]
        allowed = _allowed(candidates)
        named = [tool for tool in self._named(query) if allowed(self._ids[tool])]
        words = _query_words(query, self._postings)
        rest = self._ranked(words, allowed, limit + len(named)) if words else self._in_order(allowed)
        others = (tool for tool in rest if tool not in named)
        return [self._ids[tool] for tool in [*named, *islice(others, max(0, limit))][: max(0, limit)]]

    def _named(self, query: str) -> list[int]:
        """Tools with this id, in this spelling first."""
        wanted = query.strip()
        return sorted(self._by_folded_id.get(wanted.casefold(), ()), key=lambda tool: self._ids[tool] != wanted)

    def _in_order(self, allowed: Callable[[str], bool]) -> Iterable[int]:
        return (tool for tool, tool_id in enumerate(self._ids) if allowed(tool_id))

    def _ranked(self, words: list[str], allowed: Callable[[str], bool], limit: int) -> Iterable[int]:
        meanings = [terms for word in words for terms in self._meanings(word)]
        if len(meanings) == 1 and len(meanings[0]) == 1:
            (term,) = meanings[0]
            return (tool for tool in self._postings[term].tools if allowed(self._ids[tool]))
        meanings.sort(key=self._tools_of)
        found = self._best(self._sum(meanings, self._common), allowed, limit)
        if found or not meanings or self._tools_of(meanings[-1]) <= self._common:
            return found
        # Nothing that the rare words found is to be seen: what common words find is better than nothing.
        return self._best(self._sum(meanings, len(self._ids)), allowed, limit)

    def _best(self, scores: dict[int, float], allowed: Callable[[str], bool], limit: int) -> list[int]:
        in_order = sorted(scores)  # of ids, which both sorts below keep among equals
        few = heapq.nlargest(2 * limit + 16, in_order, key=scores.__getitem__)
        seen = [tool for tool in few if allowed(self._ids[tool])]
        if len(seen) >= limit or len(few) == len(scores):
            return seen
        ranked = sorted(in_order, key=scores.__getitem__, reverse=True)
        return list(islice((tool for tool in ranked if allowed(self._ids[tool])), limit))

    def _sum(self, meanings: list[_Terms], common: int) -> dict[int, float]:
        """Added up, rarest word first. Words of more than `common` tools find none that a rarer one did not."""
        total: dict[int, float] = {}
        read = 0
        for terms in meanings:
            read += (tools := self._tools_of(terms))
            if total and read > POSTINGS_READ_MAX:
                break
            scores = self._scores(terms)
            if not total:
                total = scores
            elif tools > common:
                for tool in total.keys() & scores.keys():
                    total[tool] += scores[tool]
            else:
                for tool, score in scores.items():
                    total[tool] = total.get(tool, 0.0) + score
        return total

    def _tools_of(self, terms: _Terms) -> int:
        return sum(len(self._postings[term].tools) for term in terms)

    def _scores(self, terms: _Terms) -> dict[int, float]:
        """Every tool that has one of the terms: the best of them, times how rare they are together."""
        tools = min(self._tools_of(terms), len(self._ids))
        rarity = math.log1p((len(self._ids) - tools + 0.5) / (tools + 0.5))
        scores: dict[int, float] = {}
        for term, worth in terms.items():
            numbers, counts = self._postings[term]
            scored = map((rarity * worth).__mul__, counts)
            if not scores:
                scores = dict(zip(numbers, scored, strict=True))
                continue
            for tool, score in zip(numbers, scored, strict=True):
                if score > scores.get(tool, 0.0):
                    scores[tool] = score
        return scores

    def _meanings(self, word: str) -> list[_Terms]:
        """What the word stands for: itself and its relatives, else two words, else a neighbour, else a cousin."""
        stem = _stem(word)
        if related := self._related(word, stem):
            return [related]
        if parts := self._parts(word):
            return parts
        if corrected := self._corrected(stem) or self._corrected(word):
            return [dict.fromkeys(corrected, CORRECTED)]
        cousins = next(filter(None, map(self._completions, _beginnings(stem))), None)
        return [dict.fromkeys(cousins, CORRECTED)] if cousins else []

    def _related(self, word: str, stem: str) -> _Terms:
        """Itself, words that begin with it, and the longest word that it begins with."""
        terms = dict.fromkeys(self._completions(word if len(stem) < SHORTENED_LETTERS_MIN else stem), RELATED)
        if (beginning := next(filter(self._postings.__contains__, _beginnings(stem)), None)) is not None:
            terms[beginning] = RELATED
        return {stem: EXACT, **terms} if stem in self._postings else terms

    def _corrected(self, word: str) -> list[str]:
        return self._spelling.corrected(word, lambda known: len(self._postings[known].tools))

    def _completions(self, start: str) -> list[str]:
        """The shortest words that go on from there."""
        if len(start) < COMPLETED_LETTERS_MIN:
            return []
        first = bisect_left(self._words, start)
        last = bisect_left(self._words, start + "\U0010ffff")
        longer = (word for word in islice(self._words, first, last) if word != start)
        return heapq.nsmallest(COMPLETIONS_MAX, longer, key=len)

    def _parts(self, word: str) -> list[_Terms]:
        """`websearch` as `web` and `search`."""
        for cut in range(len(word) - 3, 2, -1):
            first, second = _stem(word[:cut]), _stem(word[cut:])
            if first in self._postings and second in self._postings:
                return [{first: EXACT}, {second: EXACT}]
        return []


def _allowed(candidates: Filter | None) -> Callable[[str], bool]:
    if candidates is None:
        return lambda tool_id: True
    return candidates if callable(candidates) else frozenset(candidates).__contains__


# Words of a text


def _query_words(query: str, known: Collection[str]) -> list[str]:
    """Distinct words; camelCase in its parts unless the whole is known; stop words only when alone."""
    words: dict[str, None] = {}
    for word in _WORD.findall(_plain(query)):
        whole = word.casefold()[:WORD_CHARACTERS_MAX]
        parts = [whole] if _stem(whole) in known else _HUMP.sub(" ", word).casefold().split()
        words.update(dict.fromkeys(part[:WORD_CHARACTERS_MAX] for part in parts))
    telling = [word for word in words if word not in _STOP_WORDS]
    return (telling or list(words))[:QUERY_WORDS_MAX]


def _beginnings(word: str) -> Iterable[str]:
    """Shorter and shorter, as long as most of the word remains."""
    shortest = max(SHORTENED_LETTERS_MIN, math.ceil(len(word) * SHORTENED_SHARE_MIN))
    return (word[:length] for length in range(len(word) - 1, shortest - 1, -1))


def _plain(text: str) -> str:
    """Without accents and other compatibility forms of letters, case kept."""
    if text.isascii():
        return text
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def _stem(word: str) -> str:
    """The singular, more or less: queries, query; boxes, box; but caches, cach. Other endings stay."""
    if len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return word
    if len(word) > 4 and word.endswith("ies") and word[:-1] not in _ENDING_IN_IE:
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("sses", "shes", "ches", "xes")) else word[:-1]


_ENDING_IN_IE = frozenset(("movie", "cookie", "calorie", "zombie", "selfie", "smoothie", "rookie"))


class _Stems(dict[str, str]):
    """Stems of one build: texts repeat their words."""

    def __missing__(self, word: str) -> str:
        stem = self[word] = _stem(word[:WORD_CHARACTERS_MAX])
        return stem


# Building


def _postings(tools: list[ToolFields]) -> dict[str, _Postings]:
    stems = _Stems()
    ids, names, texts, tags = zip(*tools, strict=True) if tools else ((), (), (), ())
    fields = [
        (ID_WEIGHT, [_stemmed(text, stems, humps=True) for text in ids]),
        (NAME_WEIGHT, [_stemmed(text, stems, humps=True) for text in names]),
        (TEXT_WEIGHT, [_stemmed(text, stems, humps=False) for text in texts]),
        (TAGS_WEIGHT, [_stemmed(" ".join(labels), stems, humps=True) for labels in tags]),
    ]
    counts: dict[str, dict[int, float]] = {}
    for weight, words_of_tools in fields:
        _count(weight, words_of_tools, counts)
    return {word: _posting(by_tool) for word, by_tool in counts.items()}


def _stemmed(text: str, stems: _Stems, *, humps: bool) -> list[str]:
    text = _plain(text[:FIELD_CHARACTERS_MAX])
    words = _WORD.findall(text.casefold())
    if humps and (split := _HUMP.sub(" ", text)) != text:
        words = list(dict.fromkeys(words + _WORD.findall(split.casefold())))
    return [stems[word] for word in words]


def _count(weight: float, words_of_tools: list[list[str]], counts: dict[str, dict[int, float]]) -> None:
    """Add this field's words, weighted; in a longer field each counts less."""
    mean = sum(map(len, words_of_tools)) / max(1, len(words_of_tools)) or 1.0
    for tool, words in enumerate(words_of_tools):
        share = weight / (1.0 - LENGTH_NORM + LENGTH_NORM * len(words) / mean)
        for word, times in Counter(words).items():
            by_tool = counts.setdefault(word, {})
            by_tool[tool] = by_tool.get(tool, 0.0) + share * times


def _posting(by_tool: dict[int, float]) -> _Postings:
    ranked = sorted(by_tool, key=lambda tool: (-by_tool[tool], tool))
    saturated = (by_tool[tool] / (SATURATION + by_tool[tool]) for tool in ranked)
    return _Postings(array("I", ranked), array("f", saturated))
