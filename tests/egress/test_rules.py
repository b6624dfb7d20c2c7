"""What may be reached: URLs, addresses and the operator's exceptions, decided without any I/O."""

from __future__ import annotations

import ipaddress
import socket

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.egress import parse_egress_allow
from app.egress.rules import EgressRules
from app.egress.targets import parse_target
from tests.egress.addresses import REFUSED_ADDRESSES, words

PUBLIC_ADDRESSES = words("""
    1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 172.15.255.255 172.32.0.0 191.255.255.255
    192.167.255.255 198.17.255.255 198.20.0.0 223.255.255.255 93.184.216.34
    ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2606:4700:4700::1111 2a00:1450:4001::200e 2606:4700::5efe:8.8.8.8
""")


def rules(allow: str = "", *own: tuple[str, int]) -> EgressRules:
    return EgressRules(parse_egress_allow(allow), own)


def refuses(subject: EgressRules, address: str, port: int = 80, host: str = "name.test") -> bool:
    return subject.refuses(host, ipaddress.ip_address(address), port)


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
def test_address_that_is_not_public_is_refused(address: str) -> None:
    assert refuses(rules(), address, 80)
    assert refuses(rules(), address, 443)


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_address_passes_on_the_two_web_ports_alone(address: str) -> None:
    assert [port for port in (22, 80, 443, 6379, 8001, 8080) if not refuses(rules(), address, port)] == [80, 443]


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://example.com", "example.com", 80, "/"),
        ("HTTPS://Example.COM/A", "example.com", 443, "/A"),
        ("http://example.com:80/a?b=c#d", "example.com", 80, "/a?b=c"),
        ("https://example.com:8443?q=1", "example.com", 8443, "/?q=1"),
        ("http://xn--mnchen-3ya.example/ü?ß=1", "xn--mnchen-3ya.example", 80, "/%C3%BC?%C3%9F=1"),
        ("http://[2606:4700:0:0::1111]:8080/", "2606:4700::1111", 8080, "/"),
        ("http://8.8.8.8/a/../b", "8.8.8.8", 80, "/b"),
        ("http://a_b.1x.example/%zz%41", "a_b.1x.example", 80, "/%zz%41"),
        ("http://localhost/", "localhost", 80, "/"),
    ],
)
def test_plain_url_is_read_as_everyone_reads_it(url: str, host: str, port: int, path: str) -> None:
    target = parse_target(url)
    assert (target.host, target.port, target.path) == (host, port, path)


PATHS = st.lists(
    st.sampled_from(("/", "/.", "/..", ".", "?", "&=", "%", "%2e", "%C3"))
    | st.characters(exclude_categories=("C", "Z")),
    max_size=12,
)


@given(PATHS.map("".join).filter(lambda path: "\\" not in path))
def test_path_and_query_are_sent_as_httpx_would_send_them(path: str) -> None:
    url = f"http://a.test/{path}"
    assert parse_target(url).path == httpx.URL(url).raw_path.decode("ascii")


def test_parameters_are_added_to_the_query() -> None:
    target = parse_target("http://a.test/x?a=1", {"b": "2 &3", "c": True, "d": 4, "é": "ü"})
    assert target.path == "/x?a=1&b=2+%263&c=true&d=4&%C3%A9=%C3%BC"


@pytest.mark.parametrize(
    ("allow", "address", "port", "opens"),
    [
        ("10.0.0.0/8", "10.1.2.3", 5432, True),
        ("10.0.0.0/8", "11.1.2.3", 5432, False),
        ("10.0.0.0/8:9200", "10.1.2.3", 9200, True),
        ("10.0.0.0/8:9200", "10.1.2.3", 80, False),
        ("127.0.0.1", "::ffff:127.0.0.1", 8080, True),
        ("127.0.0.1", "127.0.0.2", 8080, False),
        ("name.test", "10.0.0.1", 8080, True),
        ("NAME.test:8080", "10.0.0.1", 8080, True),
        ("name.test:8080", "10.0.0.1", 80, False),
        ("other.test", "10.0.0.1", 80, False),
        ("[::1]:8080", "::1", 8080, True),
        ("[::1]:8080", "::1", 80, False),
        ("::1", "::1", 80, True),
        ("fd00::/8, 10.0.0.1", "fd12::1", 9000, True),
        ("[fd00::/8]:9000", "fd12::1", 9000, True),
        ("fd00::/8", "2001:0:a00:1::", 80, False),
        ("0.0.0.0/0, ::/0", "192.168.1.1", 25, True),
        ("0.0.0.0/0, ::/0", "0.0.0.0", 80, False),
        ("0.0.0.0/0, ::/0", "::", 80, False),
    ],
)
def test_setting_opens_exactly_what_it_says(allow: str, address: str, port: int, opens: bool) -> None:
    assert refuses(rules(allow), address, port) is not opens


@pytest.mark.parametrize("text", ["", " ", ",,", " , "])
def test_setting_without_entries_opens_nothing(text: str) -> None:
    assert refuses(rules(text), "127.0.0.1")


@pytest.mark.parametrize(
    "entry",
    words("""
    http://secret.test *.secret.test 10.0.0.1/8 10.0.0.0/33 127.1 2130706433 0x7f.1 secret.test:0 secret.test:65536
    secret.test:http [::1 ::1] [::1]:x secret.test. a@secret.test ::ffff:10.0.0.1 [::ffff:0:0/96] /8 :80 sécret.test
    secret.test:1:2:x"""),
)
def test_setting_that_cannot_be_understood_is_an_error_that_does_not_repeat_it(entry: str) -> None:
    with pytest.raises(ValueError, match=r"^entry 2: \S.*") as caught:
        parse_egress_allow(f"127.0.0.1, {entry}")
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.170.2",
        "100.100.100.200",
        "168.63.129.16",
        "fd00:ec2::254",
        "::ffff:169.254.169.254",
        "64:ff9b::169.254.169.254",
        "2002:a9fe:a9fe::",
        "64:ff9b:1:a9fe:a9:fe00::",
        "::169.254.169.254",
    ],
)
def test_metadata_address_is_opened_by_its_own_entry_alone(address: str) -> None:
    assert refuses(rules("0.0.0.0/0, ::/0, 169.254.0.0/16, 64:ff9b::/96, name.test"), address)
    plain = str(ipaddress.ip_address(address)).removeprefix("::ffff:")
    plain = "169.254.169.254" if plain == "a9fe:a9fe" else plain
    assert not refuses(rules(plain), address)


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.9"),
        ("::", "127.0.0.1"),
        ("::", "::1"),
        ("localhost", "127.0.0.1"),
        ("::1", "::1"),
    ],
)
def test_own_listening_address_is_opened_by_its_own_host_and_port_alone(listen: str, address: str) -> None:
    wide = "0.0.0.0/0, ::/0, 127.0.0.0/8:8001, 127.0.0.1, ::1, name.test"
    assert refuses(rules(wide, (listen, 8001)), address, 8001)
    assert not refuses(rules(wide, (listen, 8001)), address, 8002)
    exact = str(ipaddress.ip_address(address)).replace("::ffff:7f00:1", "127.0.0.1").replace("::ffff:", "")
    assert not refuses(rules(f"[{exact}]:8001" if ":" in exact else f"{exact}:8001", (listen, 8001)), address, 8001)
    assert not refuses(rules("name.test:8001", (listen, 8001)), address, 8001)


def test_own_address_of_an_interface_is_known_when_listening_everywhere() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no interface but loopback")
        mine = probe.getsockname()[0]
    assert refuses(rules("0.0.0.0/0", ("0.0.0.0", 8001)), mine, 8001)
    assert not refuses(rules("0.0.0.0/0", ("0.0.0.0", 8001)), "192.0.2.1", 8001)
