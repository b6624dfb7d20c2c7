"""The limits file: what it says is what is enforced, and each mistake is told with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.limits.document import UnreadableDocument, parse_json, parse_yaml
from app.limits.limits_file import (
    FILE_BYTES_MAX,
    POLICIES_MAX,
    POLICY_KEYS,
    PROBLEMS_SHOWN_MAX,
    LimitsFileError,
    read_policies,
)
from app.limits.policy import CONCURRENT_MAX, QUOTA_MAX, RATE_MAX, Match, Policy, Rate
from tests.conftest import ROOT

MINUTE_US = 60_000_000

PAGE = ROOT / "docs" / "limits.md"


def written(folder: Path, text: str | bytes, name: str = "limits.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path) -> list[str]:
    """The lines of the refusal, without the folder."""
    with pytest.raises(LimitsFileError) as caught:
        read_policies(path)
    return [line.replace(f"{path.parent}/", "") for line in str(caught.value).splitlines()]


def test_the_example_of_the_documents_is_what_they_say_of_it(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert read_policies(written(tmp_path, example)) == (
        Policy(
            name="search-free",
            match=Match(tool="web_*", limit_class="free"),
            per=("tenant", "tool"),
            rate=Rate(600, MINUTE_US, 600),
            daily=10_000,
            monthly=200_000,
            on_store_failure="local",
            shadow=False,
        ),
    )


def test_everything_that_can_be_said_is_heard(tmp_path: Path) -> None:
    text = """
policies:
- name: "a.b:C_1-"
  match:
    tool: 'w?b_*'
    tenant: t*
    subject: ann
    class: '*'
  per:
  - tool
  - subject
  - tenant
  rate: 1/day
  burst: 366
  quota:
    monthly: 1
  on_store_failure: open
  mode: shadow
- name: slots
  per: [tenant]
  max_concurrent: 100000
- {name: slow, rate: 1000000000/second, quota: {daily: 1000000000000}, on_store_failure: closed, max_concurrent: 1}
"""
    assert read_policies(written(tmp_path, text)) == (
        Policy(
            name="a.b:C_1-",
            match=Match(tool="w?b_*", tenant="t*", subject="ann"),
            per=("tenant", "subject", "tool"),
            rate=Rate(1, 86_400_000_000, 366),
            monthly=1,
            on_store_failure="open",
            shadow=True,
        ),
        Policy(name="slots", per=("tenant",), max_concurrent=100_000),
        Policy(
            name="slow",
            rate=Rate(10**9, 1_000_000, 10**9),
            daily=10**12,
            on_store_failure="closed",
            max_concurrent=1,
        ),
    )


def test_the_page_names_every_key_and_every_bound() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text().split("## Counters")[0], re.MULTILINE)
    assert tuple(rows[-len(POLICY_KEYS) :]) == POLICY_KEYS
    for bound in (RATE_MAX, QUOTA_MAX, CONCURRENT_MAX, POLICIES_MAX):
        assert f"{bound:,}" in PAGE.read_text()


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# nothing yet\n", "---\n", "policies:\n", "policies: []\n", "{}", "\ufeff"]
)
def test_a_file_without_policies_has_none(tmp_path: Path, text: str) -> None:
    assert read_policies(written(tmp_path, text)) == ()


@pytest.mark.parametrize("text", ["", " \n", "{}", '{"policies": []}', '{"policies": null}'])
def test_a_json_file_without_policies_has_none(tmp_path: Path, text: str) -> None:
    assert read_policies(written(tmp_path, text, "limits.json")) == ()


def test_json_is_read_by_its_own_rules(tmp_path: Path) -> None:
    text = '{\r\n\t"policies":[{"name":"a\\u002db","match":{"tenant":"\\/\\ud83d\\ude00\\t\u2028é\\\\\\""},'
    text += '"rate":"5/hour"}]}'
    expected = Policy(name="a-b", match=Match(tenant='/\U0001f600\t\u2028é\\"'), rate=Rate(5, 3_600_000_000, 5))
    assert read_policies(written(tmp_path, text, "limits.json")) == (expected,)
    assert refused(written(tmp_path, text, "limits.yaml"))[0].startswith("limits.yaml:2: is not YAML: ")


P = "policies:\n- name: a\n  rate: 1/second\n"
"""A file to go wrong from line 4 on."""

BAD = {
    "text instead of a mapping": ("policies", 1, "the file must be a mapping with policies; it is a text"),
    "a list at the top": ("- name: a\n  rate: 1/second\n", 1, "the file must be a mapping"),
    "another word at the top": ("# limits\npolicy:\n- name: a\n", 2, "no 'policy'; did you mean policies?"),
    "policies as a mapping": ("policies:\n  a:\n    rate: 1/second\n", 2, "policies must be a list"),
    "a policy that is a text": (P + "- 5/second\n", 4, "a policy must be a mapping with name, match"),
    "a policy that is nothing": (P + "-\n", 4, "it is nothing"),
    "no name": (P + "- match: {tool: x}\n  rate: 1/second\n", 4, "a policy needs a name"),
    "a name twice": (P + "- rate: 1/second\n  name: a\n", 5, "name is that of the policy in line 2 already"),
    "a name with a space": (P + "- name: a b\n", 4, "name must be 1 to 64 of"),
    "an empty name": (P + "- name: ''\n", 4, "name must be 1 to 64 of"),
    "a long name": (P + f"- name: {'n' * 65}\n", 4, "name must be 1 to 64 of"),
    "a name with a letter beyond ASCII": (P + "- name: é\n", 4, "name must be 1 to 64 of"),
    "a name with a line break": (P + '- name: "b\\n"\n', 4, "name must be 1 to 64 of"),
    "a tool's name": (P + "- name: tool:echo\n", 4, "names that begin with tool: or settings: are taken"),
    "a setting's name": (P + "- name: settings:rate\n", 4, "names that begin with tool: or settings: are taken"),
    "a number as name": (P + "- name: 5\n", 4, "name must be a text; it is a number, unless it is in quotes"),
    "a bool as name": (P + "- name: no\n", 4, "name must be a text; it is true or false, unless it is in quotes"),
    "a list as name": (P + "- name: [a]\n", 4, "name must be a text; it is a list"),
    "no limit": (P + "\n- name: b\n  match: {tool: x}\n", 5, "a policy needs a rate, a quota or max_concurrent"),
    "a mistyped key": (P + "  rates: 5/second\n", 4, "a policy has no 'rates'; did you mean rate?"),
    "a key in capitals": (P + "  MATCH: {tool: x}\n", 4, "a policy has no 'MATCH'; did you mean match?"),
    "a key like no other": (P + "  xyzzy: 1\n", 4, "a policy has no 'xyzzy'; it can have name, match, per"),
    "a key with line breaks": (P + '  "a\\nb": 1\n', 4, "a policy has no 'a\\nb'; it can have"),
    "a bool as key": (P + "  on: 1\n", 4, "a policy has no 'on'"),
    "a list as key": (P + "  ? [a]\n  : 1\n", 4, "has a key that is no text"),
    "a merge": (P + "  <<: {per: []}\n", 4, "a policy has no '<<'"),
    "a key twice": (P + "  rate: 2/second\n", 4, "has the key 'rate' again, as in line 3"),
    "a key twice, once in quotes": (P + '  "rate": 2/second\n', 4, "has the key 'rate' again, as in line 3"),
    "a rate in words": (P + "- name: b\n  rate: 10 per second\n", 5, "a rate is N/second, N/minute, N/hour or N/day"),
    "a rate as a number": (P + "- name: b\n  rate: 10\n", 5, "rate must be a text; it is a number"),
    "a rate of 0": (P + "- name: b\n  rate: 0/second\n", 5, "as 600/minute"),
    "a rate over the bound": (P + "- name: b\n  rate: 1000000001/second\n", 5, "N from 1 to 1000000000"),
    "a plural": (P + "- name: b\n  rate: 10/seconds\n", 5, "as 600/minute"),
    "a short unit": (P + "- name: b\n  rate: 10/s\n", 5, "as 600/minute"),
    "a burst of 0": (P + "  burst: 0\n", 4, "burst must be a whole number from 1 to 1000000000 in plain digits"),
    "a burst of years": (P + "- name: b\n  rate: 1/day\n  burst: 367\n", 6, "burst must be 1 to 366 at this rate"),
    "a burst without a rate": (P + "- name: b\n  burst: 5\n  quota: {daily: 1}\n", 5, "burst needs a rate"),
    "a burst as a text": (P + "  burst: '5'\n", 4, "from 1 to 1000000000 in plain digits; it is a text"),
    "an empty quota": (P + "  quota: {}\n", 4, "quota needs daily or monthly, as {daily: 10000}"),
    "a weekly quota": (P + "  quota:\n    daily: 1\n    weekly: 5\n", 6, "quota has no 'weekly'"),
    "a quota as a number": (P + "  quota: 5\n", 4, "quota must be a mapping with daily, monthly; it is a number"),
    "a quota of 0": (P + "  quota: {daily: 0}\n", 4, "daily must be a whole number from 1 to 1000000000000"),
    "a negative quota": (P + "  quota: {daily: -1}\n", 4, "daily must be a whole number from 1"),
    "a bool as quota": (P + "  quota: {daily: true}\n", 4, "in plain digits; it is true or false"),
    "a fraction as quota": (P + "  quota: {monthly: 10.0}\n", 4, "monthly must be a whole number"),
    "an exponent as quota": (P + "  quota: {monthly: 1e6}\n", 4, "monthly must be a whole number"),
    "an octal quota": (P + "  quota: {daily: 0100}\n", 4, "in plain digits"),
    "a sexagesimal quota": (P + "  quota: {daily: 1:30}\n", 4, "in plain digits"),
    "a quota with underscores": (P + "  quota: {daily: 10_000}\n", 4, "in plain digits"),
    "a quota that is nothing": (P + "  quota: {daily: }\n", 4, "in plain digits; it is nothing"),
    "a quota over the bound": (P + "  quota: {daily: 1000000000001}\n", 4, "daily must be a whole number"),
    "a quota of 5,000 digits": (P + f"  quota: {{daily: {'9' * 5000}}}\n", 4, "daily must be a whole number"),
    "slots of 0": (P + "  max_concurrent: 0\n", 4, "max_concurrent must be a whole number from 1 to 100000"),
    "slots in shadow": (
        P + "- name: b\n  max_concurrent: 5\n  mode: shadow\n",
        6,
        "max_concurrent cannot be in shadow",
    ),
    "slots with a store": (P + "- name: b\n  max_concurrent: 5\n  on_store_failure: open\n", 6, "slots have no store"),
    "per as a text": (P + "  per: tenant\n", 4, "per must be a list out of tenant, subject, tool, as [tenant, tool]"),
    "per something else": (P + "  per:\n  - tenant\n  - agent\n", 6, "per must be a list out of"),
    "per the class": (P + "  per: [class]\n", 4, "per must be a list out of"),
    "per a list of lists": (P + "  per: [[tool]]\n", 4, "per must be a list out of"),
    "per twice the same": (P + "  per:\n  - tool\n  - tool\n", 6, "per has tool twice"),
    "per nothing": (P + "  per:\n", 4, "per must be a list out of"),
    "match as a text": (P + "  match: web_*\n", 4, "match must be a mapping with tool, tenant, subject, class"),
    "match nothing": (P + "  match:\n  per: []\n", 4, "it is nothing"),
    "match something else": (
        P + "  match:\n    tool: x\n    tennant: y\n",
        6,
        "match has no 'tennant'; did you mean tenant?",
    ),
    "match a number": (
        P + "  match: {tenant: 42}\n",
        4,
        "tenant must be a text; it is a number, unless it is in quotes",
    ),
    "match an exponent": (P + "  match: {tenant: 1e3}\n", 4, "tenant must be a text; it is a number, unless"),
    "match a date": (P + "  match: {tenant: 2026-01-01}\n", 4, "tenant must be a text; it is a date"),
    "match a list": (P + "  match: {tool: [a, b]}\n", 4, "tool must be a text; it is a list"),
    "match an empty text": (P + "  match: {class: ''}\n", 4, "class must have 1 to 256 characters"),
    "a long glob": (P + f"  match: {{tool: {'a' * 257}}}\n", 4, "tool must have 1 to 256 characters"),
    "another answer": (P + "  on_store_failure: allow\n", 4, "on_store_failure must be local, open or closed"),
    "an answer in capitals": (P + "  on_store_failure: Local\n", 4, "on_store_failure must be local, open or closed"),
    "another mode": (P + "  mode: off\n", 4, "mode must be enforce or shadow"),
    "a bare star": (P + "  match:\n    tool: *\n", 5, "a glob that begins with * needs quotes"),
    "a star before a name": (P + "  match: {tool: *_search}\n", 4, "a glob that begins with * needs quotes"),
    "an anchor": ("policies: &all\n- name: a\n  rate: 1/second\n", 1, "has an anchor or a tag"),
    "an anchor on a text": (P + "- name: &b b\n", 4, "has an anchor or a tag"),
    "an anchor on a key": (P + "  &x per: []\n", 4, "has an anchor or a tag"),
    "a tag": (P + "- name: !!str 5\n", 4, "has an anchor or a tag"),
    "a tag of Python": (P + "- !!python/object/apply:os.system [exit]\n", 4, "has an anchor or a tag"),
    "a second document": (P + "---\n" + P, 4, "has a second document"),
    "a tab": (P + "\tper: []\n", 4, "is not YAML: found character '\\t' that cannot start any token"),
    "a list left open": (P + "  per: [tool\n  quota: {daily: 1}\n", 5, "that begins in line 4"),
    "quotes left open": (P + "- name: 'b\n  rate: 1/second\n", 6, "that begins in line 4"),
    "a key further in": (P + "    per: []\n", 4, "is not YAML: mapping values are not allowed here"),
    "a control character": (P + "# \x07\n", 4, "has a character that YAML does not allow"),
    "an escape beyond Unicode": (P + '- name: "\\U00110000"\n', 4, "is not YAML: a number in it is too high"),
    "a huge escape": (P + '- name: "\\Uffffffff"\n', 4, "is not YAML: a number in it is too high"),
    "a huge version": (f"# limits\n%YAML 1.{'9' * 5000}\n---\n{P}", 2, "is not YAML: a number in it is too high"),
    "a version to come": (f"%YAML 2.0\n---\n{P}", 1, "is not YAML: "),
    "an unknown escape": (P + '- name: "\\q"\n', 4, "is not YAML: "),
    "a nul": (P + "\0", 4, "has a character that YAML does not allow"),
    "deep nesting": (P + "- " + "[" * 100_000, 4, "is nested over 8 levels deep"),
    "deep block nesting": (P + "- " * 100_000, 4, "is nested over 8 levels deep"),
    "bytes that are not UTF-8": (P.encode() + b"# \xff\n", 4, "is not UTF-8"),
    "UTF-16": (P.encode("utf-16"), 1, "is not UTF-8"),
}


@pytest.mark.parametrize(("text", "line", "reason"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_told_with_its_line_and_a_reason(
    tmp_path: Path, text: str | bytes, line: int, reason: str
) -> None:
    (told,) = refused(written(tmp_path, text))
    assert told.startswith(f"limits.yaml:{line}: ") and reason in told


BAD_JSON = {
    "a comma too many": ('{"policies": [\n{"name": "a", "rate": "1/second",}\n]}', 2, "is not JSON: "),
    "a comment": ('{\n# here\n"policies": []}', 2, "is not JSON: Expecting property name"),
    "YAML": ("policies: []\n", 1, "is not JSON: Expecting value"),
    "a bad escape": ('{"policies":\n"\\x41"}', 2, "is not JSON: Invalid \\escape"),
    "a raw tab in a text": ('{"policies": [\n{"name": "a\tb"}]}', 2, "is not JSON: Invalid control character"),
    "deep nesting": ("[" * 200_000, 1, "is nested too deep"),
    "a key twice": ('{"policies":\n[],\n"policies": []}', 3, "has the key 'policies' again, as in line 1"),
    "a number as a text": (
        '{"policies": [\n{"name":\n"a", "quota":\n{"daily":\n"5"}}]}',
        5,
        "daily must be a whole number",
    ),
    "a huge number": (
        '{"policies": [{"name": "a",\n"max_concurrent": ' + "9" * 5000 + "}]}",
        2,
        "max_concurrent must be",
    ),
    "a bool as a number": ('{"policies": [{"name": "a",\n"quota": {"daily": true}}]}', 2, "it is true or false"),
}


@pytest.mark.parametrize(("text", "line", "reason"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_a_mistake_in_a_json_file_is_told_with_its_line_too(tmp_path: Path, text: str, line: int, reason: str) -> None:
    (told,) = refused(written(tmp_path, text, "limits.json"))
    assert told.startswith(f"limits.json:{line}: ") and reason in told


def test_all_mistakes_are_told_at_once_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = "extra: 1\npolicies:\n- name: a\n  rate: fast\n  mode: on\n- quota: {daily: 0}\n- rate: 1/day\n"
    assert [line.split(": ", 1)[0] for line in refused(written(tmp_path, text))] == [
        f"limits.yaml:{line}" for line in (1, 4, 5, 6, 7)
    ]


def test_of_very_many_mistakes_the_first_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    told = refused(written(tmp_path, "policies:\n" + "- 1\n" * (PROBLEMS_SHOWN_MAX + 7)))
    assert len(told) == PROBLEMS_SHOWN_MAX + 1
    assert told[-1] == "limits.yaml: and 7 more"


def test_no_more_policies_are_taken_than_a_call_can_look_at(tmp_path: Path) -> None:
    text = "policies:\n" + "".join(f"- {{name: p{n}, rate: 1/day}}\n" for n in range(POLICIES_MAX))
    assert len(read_policies(written(tmp_path, text))) == POLICIES_MAX
    (told,) = refused(written(tmp_path, text + "- {name: more, rate: 1/day}\n"))
    assert told == f"limits.yaml:{POLICIES_MAX + 2}: there may be {POLICIES_MAX} policies at most"


def test_a_file_over_the_bound_is_not_read_on(tmp_path: Path) -> None:
    filled = P + "#" * (FILE_BYTES_MAX - len(P))
    assert len(read_policies(written(tmp_path, filled))) == 1
    assert refused(written(tmp_path, filled + "#"))[0] == f"limits.yaml:4: is over {FILE_BYTES_MAX} bytes"


def test_a_file_that_cannot_be_read_is_told_without_a_line(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.yaml") == ["none.yaml: cannot be read: No such file or directory"]
    (tmp_path / "folder.yaml").mkdir()
    assert refused(tmp_path / "folder.yaml") == ["folder.yaml: cannot be read: Is a directory"]


def test_the_refusal_shows_no_value_of_the_file(tmp_path: Path) -> None:
    secret = "hunter2"
    text = f"""policies:
- name: {secret} x
  match: {{tool: {secret}, tenant: [{secret}], class: '{secret * 50}'}}
  per: [{secret}]
  rate: {secret}
  quota: {{daily: {secret}}}
  on_store_failure: {secret}
  mode: {secret}
"""
    told = refused(written(tmp_path, text))
    assert len(told) == 8
    assert secret not in "\n".join(told)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(value=json_values, indent=st.sampled_from([None, 1, "\t"]), ascii_only=st.booleans())
def test_every_json_value_reads_as_itself_with_the_lines_of_its_text(
    value: object, indent: int | str | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    tree = parse_json(text)
    assert tree is not None
    check(tree, value)
    assert tree.line == 1
    if indent is not None and isinstance(value, dict):
        keys_at_first_level = [n for n, line in enumerate(text.split("\n"), 1) if line[1:2] == '"' and line[0] in " \t"]
        assert isinstance(tree.value, dict)
        assert [entry.line for entry in tree.value.values()] == keys_at_first_level


def check(node: object, value: object) -> None:
    """Texts, truths, integers of up to 18 digits, lists and mappings come through; all else is told by its kind."""
    found = node.value  # type: ignore[attr-defined]
    if isinstance(value, dict):
        assert list(found) == list(value)
        for key, inner in value.items():
            check(found[key].node, inner)
    elif isinstance(value, list):
        assert len(found) == len(value)
        for each, inner in zip(found, value, strict=True):
            check(each, inner)
    elif isinstance(value, str | bool) or (type(value) is int and abs(value) < 10**18):
        assert found == value and type(found) is type(value)
    else:
        assert found is None


@given(text=st.text(st.sampled_from("ab01:-?#&*!|>'\"%@[]{},\n\t \\/~\u2028é\0"), max_size=40))
def test_any_text_is_a_tree_or_told_with_a_line_that_it_has(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        try:
            parse(text)
        except UnreadableDocument as error:
            assert 1 <= error.line <= len(text.splitlines()) + 1
            assert str(error)
