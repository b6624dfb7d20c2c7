"""Finding tools by words as agents and people type them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations
from string import ascii_lowercase

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.tools.search import (
    COMPLETIONS_MAX,
    QUERY_CHARACTERS_MAX,
    QUERY_WORDS_MAX,
    SearchIndex,
    ToolFields,
)
from app.tools.spelling import CORRECTIONS_MAX, Spelling, distance

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TOOLS: list[ToolFields] = [
    ("calculator", "Calculator", "Compute with numbers: one operation or an expression.", ["math", "numbers"]),
    ("current_time", "Current Time", "Tell the current date and time.", ["clock", "timezone"]),
    ("http_request", "HTTP Request", "Send a request and return status, headers and body.", ["web"]),
    ("web_scrape", "Web Scrape", "Fetch a page and return its title, text and links.", ["web", "html"]),
    ("web_search", "Web Search", "Search the internet and return titles and snippets.", ["web"]),
    ("wikipedia_search", "Wikipedia Search", "Find an article and return its summary.", ["knowledge"]),
    ("graphql_query", "GraphQL Query", "Send a query to an endpoint.", ["api"]),
    ("sendEmail", "Send Email", "Send a message to one or more recipients.", ["mail"]),
    ("database_query", "Database Query", "Run a statement against the warehouse.", ["sql"]),
    ("translate_text", "Translate Text", "Put a text into another language.", ["language"]),
    ("movie_list", "Movie List", "Films of a year.", ["film"]),
    ("notification_push", "Push Notification", "Reach a phone.", ["mobile"]),
    ("kubernetes_restart", "Restart", "Restart a pod of a deployment.", ["ops"]),
    ("coffee_order", "Bestellung", "Bestellt Kaffee im Café, auch größere Mengen.", ["essen"]),
]
INDEX = SearchIndex(TOOLS)
IDS = sorted(tool[0] for tool in TOOLS)


def search(query: str, limit: int = 100) -> list[str]:
    return INDEX.search(query, None, limit)


# Ranking


def test_a_word_counts_more_in_id_and_name_than_in_tags_and_there_more_than_in_the_description() -> None:
    index = SearchIndex(
        [
            ("d_text", "One", "About maps and other things.", ["other"]),
            ("c_tags", "One", "About other things.", ["maps"]),
            ("b_name", "Maps", "About other things.", ["other"]),
            ("maps_id", "One", "About other things.", ["other"]),
            ("a_none", "One", "About other things.", ["other"]),
        ]
    )
    assert index.search("maps", None, 10) == ["b_name", "maps_id", "c_tags", "d_text"]


def test_a_tool_with_more_of_the_words_comes_first() -> None:
    assert search("search wikipedia")[0] == "wikipedia_search"
    assert search("web search")[0] == "web_search"
    assert search("web page")[0] == "web_scrape"


def test_a_rare_word_counts_more_than_a_frequent_one() -> None:
    index = SearchIndex([(f"send_{kind}", kind, "Sends.", []) for kind in ("mail", "fax", "letter", "parcel")])
    assert index.search("send parcel", None, 10)[0] == "send_parcel"


def test_a_word_counts_less_in_a_longer_field() -> None:
    index = SearchIndex([("a", "A", "Reads weather " + "and more " * 50, []), ("b", "B", "Reads weather.", [])])
    assert index.search("weather", None, 10) == ["b", "a"]


@pytest.mark.parametrize(
    ("query", "tool_id"),
    [
        ("CALCULATOR", "calculator"),
        ("what time is it", "current_time"),
        ("please translate this into english", "translate_text"),
        ("sql", "database_query"),
        ("graphql", "graphql_query"),
        ("send_email", "sendEmail"),
        ("sendemail", "sendEmail"),
        ("email", "sendEmail"),
        ("movieList", "movie_list"),
        ("cafe", "coffee_order"),
        ("CAFÉ", "coffee_order"),
        ("GRÖSSERE", "coffee_order"),
        ("ｋａｆｆｅｅ", "coffee_order"),
        ("wikipedia, summary!", "wikipedia_search"),
        ("websearch", "web_search"),
    ],
)
def test_words_are_found_in_any_dress(query: str, tool_id: str) -> None:
    assert search(query)[0] == tool_id


@pytest.mark.parametrize(
    ("query", "tool_id"),
    [
        ("calculators", "calculator"),
        ("emails", "sendEmail"),
        ("queries database", "database_query"),
        ("movies", "movie_list"),
        ("article", "wikipedia_search"),
        ("articles", "wikipedia_search"),
        ("languages", "translate_text"),
        ("statuses", "http_request"),
        ("summaries", "wikipedia_search"),
        ("bodies", "http_request"),
        ("number", "calculator"),
    ],
)
def test_singular_and_plural_find_one_another(query: str, tool_id: str) -> None:
    assert search(query)[0] == tool_id


@pytest.mark.parametrize(
    ("query", "tool_id"),
    [
        ("calc", "calculator"),
        ("wiki", "wikipedia_search"),
        ("kube", "kubernetes_restart"),
        ("tr", "translate_text"),
        ("notif", "notification_push"),
        ("calculate", "calculator"),
        ("translation", "translate_text"),
        ("scraper", "web_scrape"),
        ("searching internet", "web_search"),
    ],
)
def test_a_beginning_finds_the_word_and_a_longer_form_its_beginning(query: str, tool_id: str) -> None:
    assert search(query)[0] == tool_id


@pytest.mark.parametrize(
    ("query", "tool_id"),
    [
        ("calcualtor", "calculator"),
        ("calulater", "calculator"),
        ("databse", "database_query"),
        ("dattabase", "database_query"),
        ("transalte", "translate_text"),
        ("wikipdia serach", "wikipedia_search"),
        ("emial", "sendEmail"),
        ("tmie", "current_time"),
        ("kuberntes", "kubernetes_restart"),
        ("notificatoin", "notification_push"),
        ("movei", "movie_list"),
        ("moveis", "movie_list"),
        ("grapql", "graphql_query"),
    ],
)
def test_a_typing_error_is_forgiven(query: str, tool_id: str) -> None:
    assert search(query)[0] == tool_id


def test_the_word_itself_comes_before_longer_words_and_corrections() -> None:
    index = SearchIndex([("mapper", "Mapper", "Maps.", []), ("map", "Map", "Shows.", []), ("mop", "Mop", "Wipes.", [])])
    assert index.search("map", None, 10) == ["map", "mapper"]


@pytest.mark.parametrize("query", ["xylophone", "qqq", "zzzzzzzzzzzz", "天気", "\u202e\u202e x"])
def test_what_is_not_there_is_not_found(query: str) -> None:
    assert search(query) == []


def test_short_words_are_not_corrected() -> None:
    assert search("wab") == []


# Stability


def test_equals_come_in_the_order_of_their_ids_and_pages_do_not_move() -> None:
    tools = [(f"tool_{number:03}", "Same", "The same.", []) for number in range(200)]
    random.Random(5).shuffle(tools)
    index = SearchIndex(tools)
    everything = index.search("same", None, 1_000)
    assert everything == sorted(tool[0] for tool in tools)
    assert [index.search("same", None, limit) for limit in (1, 7, 150)] == [everything[:limit] for limit in (1, 7, 150)]
    assert index.search("the same", None, 1_000) == everything


@unhurried
@given(st.permutations(TOOLS), st.sampled_from(["web search", "query", "send text", "calcualtor", "", "re"]))
def test_the_order_of_registration_does_not_matter(tools: list[ToolFields], query: str) -> None:
    assert SearchIndex(tools).search(query, None, 100) == search(query)


words = st.sampled_from([word for tool in TOOLS for field in (tool[1], tool[2], *tool[3]) for word in field.split()])
queries = st.lists(words | st.text(max_size=8), max_size=6).map(" ".join)


@unhurried
@given(queries, st.integers(0, 20), st.frozensets(st.sampled_from(IDS)))
def test_a_shorter_answer_is_the_beginning_of_a_longer_one(query: str, limit: int, candidates: frozenset[str]) -> None:
    everything = INDEX.search(query, candidates, 100)
    assert INDEX.search(query, candidates, limit) == everything[:limit]
    assert len(set(everything)) == len(everything)
    assert candidates.issuperset(everything)


# Filters


def test_a_filter_is_a_collection_or_a_function() -> None:
    only = {"web_search", "web_scrape"}
    expected = ["web_scrape", "web_search"]
    for candidates in (only, frozenset(only), sorted(only), dict.fromkeys(only), only.__contains__):
        assert sorted(INDEX.search("web", candidates, 10)) == expected
        assert INDEX.search("", candidates, 10) == expected
        assert INDEX.search("calculator", candidates, 10) == []


def test_few_candidates_are_found_however_low_they_rank() -> None:
    index = SearchIndex((f"t{number:04}", "Reads data", "Reads.", ["data"] * (number % 7)) for number in range(2_000))
    assert index.search("data reads", {"t0000", "t0007", "t1001"}, 10) == ["t0000", "t0007", "t1001"]
    assert index.search("data", {"t1002", "t1001"}, 10) == ["t1002", "t1001"]


def test_common_words_rank_what_rare_ones_found_and_find_when_those_found_nothing_visible() -> None:
    texts = ["Common words."] * 40 + ["Other."] * 60
    tools = [(f"t{number:03}", "Thing", text, []) for number, text in enumerate(texts)]
    index = SearchIndex([*tools, ("rare_bird", "Bird", "Rare.", []), ("rare_fish", "Fish", "Rare and common.", [])])
    assert index.search("common rare", None, 10) == ["rare_fish", "rare_bird"]
    assert index.search("common rare", {"t001", "t002"}, 10) == ["t001", "t002"]
    assert index.search("common words", None, 3) == ["t000", "t001", "t002"]


# No words, no tools, too many


@pytest.mark.parametrize("query", ["", "  ", "!?", "\n\t", "__-__", "\u0301"])
def test_a_query_without_a_word_has_all_in_the_order_of_ids(query: str) -> None:
    assert search(query) == IDS
    assert search(query, 3) == IDS[:3]


def test_stop_words_are_looked_for_when_there_is_nothing_else() -> None:
    index = SearchIndex([("to_do", "To Do", "Lists.", []), ("other", "Other", "Goes to.", []), ("third", "C", "D", [])])
    assert index.search("to", None, 10) == ["to_do", "other"]
    assert "third" not in index.search("to do", None, 10)


def test_an_empty_index_finds_nothing() -> None:
    index = SearchIndex([])
    assert len(index) == 0
    assert index.search("anything", None, 10) == index.search("", None, 10) == []


@pytest.mark.parametrize("limit", [0, -1])
def test_no_limit_below_nothing(limit: int) -> None:
    assert search("web", limit) == search("", limit) == search("calculator", limit) == []


def test_a_long_query_is_read_by_its_beginning() -> None:
    assert search(" " * QUERY_CHARACTERS_MAX + "calculator") == IDS
    many = " ".join(f"unknown{letter}" for letter in ascii_lowercase[:QUERY_WORDS_MAX])
    assert search(f"{many} calculator") == []
    assert search("calculator " + many)[0] == "calculator"
    assert search("a" * 1_000_000) == []


def test_a_short_beginning_is_completed_to_a_bounded_number_of_words() -> None:
    index = SearchIndex((f"x{letter * 3}", "Tool", "Text.", []) for letter in ascii_lowercase)
    assert len(index.search("x", None, 100)) == 0
    index = SearchIndex((f"xx{letter * 3}", "Tool", "Text.", []) for letter in ascii_lowercase)
    assert len(index.search("xx", None, 100)) == COMPLETIONS_MAX


def test_odd_tools_can_be_indexed() -> None:
    index = SearchIndex(
        [("a", "", "", []), ("b", "\ud800", "\x00" * 10, [""]), ("c", "C", "word " * 100_000, ["x"] * 999)]
    )
    assert index.search("word", None, 10) == ["c"]
    assert index.search("", None, 10) == ["a", "b", "c"]


# Ids

tool_ids = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", fullmatch=True)
tools = st.lists(
    st.tuples(tool_ids, st.text(max_size=20), st.text(max_size=60), st.lists(st.text(max_size=10), max_size=3)),
    unique_by=lambda tool: tool[0],
    max_size=12,
)


@unhurried
@given(tools)
@example([("a", "b b b b", "b", []), ("b", "", "", []), ("B", "b", "b", ["b"])])
@example([("to", "", "", []), ("the_to", "to to", "to", ["to"])])
@example([("___", "", "", []), ("_", "", "", [])])
def test_an_id_finds_its_tool_first(documents: list[ToolFields]) -> None:
    index = SearchIndex(documents)
    for tool_id, *_ in documents:
        assert index.search(tool_id, None, 100)[0] == tool_id
        assert index.search(f" {tool_id.swapcase()} ", None, 100)[0].casefold() == tool_id.casefold()


@unhurried
@given(tools, st.text(max_size=300), st.integers(-1, 20))
def test_any_text_gives_known_ids_within_the_limit(documents: list[ToolFields], query: str, limit: int) -> None:
    found = SearchIndex(documents).search(query, None, limit)
    assert len(found) <= max(0, limit)
    assert {tool[0] for tool in documents}.issuperset(found)


# Spelling


def _one_error(word: str) -> Iterator[str]:
    for at in range(len(word) + 1):
        yield from (word[:at] + letter + word[at:] for letter in "xq")
        yield word[:at] + word[at + 1 :]
        yield from (word[:at] + letter + word[at + 1 :] for letter in "xq")
        yield word[:at] + word[at : at + 2][::-1] + word[at + 2 :]


@pytest.mark.parametrize("word", ["mail", "query", "weather", "database", "kubernetes"])
def test_one_error_anywhere_in_a_word_of_four_letters_is_corrected(word: str) -> None:
    spelling = Spelling([word, "entirely", "different", "vocabulary"])
    for wrong in _one_error(word):
        if len(wrong) >= 4:
            assert distance(wrong, word, 2) <= 1
            assert spelling.corrected(wrong, lambda known: 1) == [word], wrong


def test_two_errors_are_corrected_in_words_of_eight_letters_only() -> None:
    spelling = Spelling(["calendar", "weather"])
    assert spelling.corrected("calxndxr", len) == ["calendar"]
    assert spelling.corrected("wexthxr", len) == []
    assert spelling.corrected("cxlxndxr", len) == []


def test_fewer_errors_win_then_the_more_frequent_word() -> None:
    frequency = {"search": 5, "perch": 1, "starch": 9, "serf": 1}
    assert Spelling(frequency).corrected("serch", frequency.__getitem__) == ["search", "perch"]


def test_corrections_are_few() -> None:
    spelling = Spelling(f"wor{a}{b}" for a, b in combinations(ascii_lowercase, 2))
    assert len(spelling.corrected("word", lambda known: 1)) <= CORRECTIONS_MAX


def _distance(a: str, b: str) -> int:
    """The same by its definition."""
    if not a or not b:
        return len(a) + len(b)
    least = min(_distance(a[1:], b) + 1, _distance(a, b[1:]) + 1, _distance(a[1:], b[1:]) + (a[0] != b[0]))
    if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0]:
        least = min(least, _distance(a[2:], b[2:]) + 1)
    return least


@unhurried
@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.integers(0, 3))
def test_the_distance_is_that_of_its_definition(a: str, b: str, most: int) -> None:
    assert distance(a, b, most) == min(_distance(a, b), most + 1)
