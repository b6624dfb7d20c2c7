"""What may be reached: addresses that are public, and the operator's exceptions (EGRESS_ALLOW).

Decides and connects nowhere. Knows no HTTP client; `client` asks it before every hop.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from app.egress.targets import DEFAULT_PORTS, Address, ends_in_number, is_host_name
from app.errors import ToolError

Network = IPv4Network | IPv6Network


def egress_refused() -> ToolError:
    """One text for every reason, so that a refusal tells nothing of the network behind it."""
    return ToolError("egress refused", code="EGRESS_REFUSED")


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(part) for part in text.split())


_REFUSED_IPV4 = _networks(
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24"
    " 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4"
)
"""IANA's special-purpose registry, written out: `ipaddress` reads it differently from one Python to the next."""

_GLOBAL_IPV6 = IPv6Network("2000::/3")
"""All that IANA has ever handed out as global unicast. Starting here leaves out site-local, compatible and the rest."""

_REFUSED_IPV6 = _networks("2001::/23 2001:db8::/32 2002::/16 3ffe::/16 3fff::/20")
"""Protocol assignments with Teredo, documentation, 6to4, the former 6bone. A tunnel ends at an IPv4 of its own."""

_NAT64 = IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")
_COMPATIBLE = IPv6Network("::/96")
_TEREDO = IPv6Network("2001::/32")
_6TO4 = IPv6Network("2002::/16")
_ISATAP_IDS = frozenset({0x00005EFE, 0x02005EFE})
"""Upper half of an ISATAP interface identifier, for private and for global IPv4 (RFC 5214, section 6.1)."""

_METADATA = _networks(
    "169.254.0.0/16 100.100.100.200/32 168.63.129.16/32 192.0.0.192/32 fd00:ec2::/32 fd00:c1::/32 fd20:ce::/32"
)
"""Where clouds keep credentials. The whole link-local range: container platforms answer at several places in it."""


def unmapped(address: Address) -> Address:
    """The IPv4 address inside `::ffff:a.b.c.d`, which is what the kernel connects to."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def embedded_ipv4(address: IPv6Address) -> tuple[IPv4Address, ...]:
    """Every IPv4 address that some transition mechanism would read out of `address`."""
    number = int(address)
    low = IPv4Address(number & 0xFFFFFFFF)
    if address in _6TO4:
        return (IPv4Address(number >> 80 & 0xFFFFFFFF),)
    if address in _TEREDO:  # server, then the client with its bits turned over (RFC 4380, section 4)
        return IPv4Address(number >> 64 & 0xFFFFFFFF), IPv4Address(number & 0xFFFFFFFF ^ 0xFFFFFFFF)
    if address in _NAT64_LOCAL:  # /48 spreads the address around bits 64 to 71; /96 keeps it last (RFC 6052)
        return IPv4Address((number >> 64 & 0xFFFF) << 16 | number >> 40 & 0xFFFF), low
    if address in _NAT64 or address in _COMPATIBLE or number >> 32 & 0xFFFFFFFF in _ISATAP_IDS:
        return (low,)
    return ()


def is_public(address: Address) -> bool:
    """Whether anyone on the Internet could reach it, by its own rules and by those of any IPv4 inside."""
    address = unmapped(address)
    if isinstance(address, IPv4Address):
        return address.is_global and not _within(address, _REFUSED_IPV4) and not _within(address, _METADATA)
    if address in _NAT64:  # how a network with IPv6 only reaches the rest
        return all(is_public(inner) for inner in embedded_ipv4(address))
    if address not in _GLOBAL_IPV6 or _within(address, _REFUSED_IPV6) or not address.is_global:
        return False
    return all(is_public(inner) for inner in embedded_ipv4(address))


def is_metadata(address: Address) -> bool:
    address = unmapped(address)
    inner = embedded_ipv4(address) if isinstance(address, IPv6Address) else ()
    return any(_within(each, _METADATA) for each in (address, *inner))


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


@dataclass(frozen=True, slots=True)
class EgressAllow:
    """The operator's exceptions. Port None opens every port; a single address is a network of one."""

    networks: tuple[tuple[Network, int | None], ...] = ()
    hosts: frozenset[tuple[str, int | None]] = frozenset()

    def opens(self, host: str, address: Address, port: int) -> bool:
        return self._names_host(host, {None, port}) or any(
            address in network and opened in (None, port) for network, opened in self.networks
        )

    def lists_address(self, address: Address, port: int) -> bool:
        """Whether this one address is listed, not a network around it."""
        return self._names_address(address, {None, port})

    def lists_endpoint(self, host: str, address: Address, port: int) -> bool:
        """Whether exactly this host or address is listed with exactly this port."""
        return self._names_host(host, {port}) or self._names_address(address, {port})

    def _names_host(self, host: str, ports: set[int | None]) -> bool:
        return any((host, port) in self.hosts for port in ports)

    def _names_address(self, address: Address, ports: set[int | None]) -> bool:
        single = ipaddress.ip_network(address)
        return any((single, port) in self.networks for port in ports)


_ENTRY = re.compile(r"\[(?P<bracketed>[^\[\]]+)\](?::(?P<port6>[0-9]+))?|(?P<plain>[^:\[\]]+)(?::(?P<port4>[0-9]+))?")


def parse_egress_allow(text: str) -> EgressAllow:
    """EGRESS_ALLOW: `127.0.0.1, 10.0.0.0/8:9200, search.internal:8080, [::1]:8080, [fd00::/8]`.

    Raises ValueError that says which entry is wrong and why, without repeating it.
    """
    networks: list[tuple[Network, int | None]] = []
    hosts: set[tuple[str, int | None]] = set()
    entries = [entry for entry in (part.strip() for part in text.split(",")) if entry]
    for position, entry in enumerate(entries, start=1):
        try:
            place, port = _parse_entry(entry)
        except ValueError as error:
            raise ValueError(f"entry {position}: {error}") from None
        if isinstance(place, str):
            hosts.add((place, port))
        else:
            networks.append((place, port))
    return EgressAllow(tuple(networks), frozenset(hosts))


def _parse_entry(entry: str) -> tuple[Network | str, int | None]:
    if "[" not in entry and entry.count(":") > 1:
        return _parse_network(entry), None
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ValueError("must be a host or a network with an optional :port; IPv6 with a port goes in brackets")
    port_text = match["port6"] or match["port4"]
    port = int(port_text) if port_text else None
    if port is not None and not 1 <= port <= 65_535:
        raise ValueError("port must be 1..65535")
    plain = (match["plain"] or "").lower()
    if match["bracketed"] or "/" in plain or ends_in_number(plain):
        return _parse_network(match["bracketed"] or plain), port
    if not is_host_name(plain):
        raise ValueError("is no host name; wildcards and URLs are not taken")
    return plain, port


def _parse_network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise ValueError("is no address or network, or has bits set past its prefix") from None
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError("is IPv4 written as IPv6; write the IPv4 address itself")
    return network


@dataclass(frozen=True, slots=True)
class EgressRules:
    """The one decision: may this host, at this address and port, be connected to?"""

    allow: EgressAllow = field(default_factory=EgressAllow)
    own_addresses: tuple[tuple[str, int], ...] = ()
    """Where this process listens, as host and port."""

    def refuses(self, host: str, address: Address, port: int) -> bool:
        address = unmapped(address)
        if address.is_unspecified or (isinstance(address, IPv6Address) and address.scope_id):
            return True  # the first means loopback to a kernel, the second has no meaning beyond a link
        if self._is_own(address, port):
            return not self.allow.lists_endpoint(host, address, port)
        if is_metadata(address):  # a name is not enough: whoever runs its DNS could point it here
            return not self.allow.lists_address(address, port)
        if self.allow.opens(host, address, port):
            return False
        return port not in DEFAULT_PORTS.values() or not is_public(address)

    def _is_own(self, address: Address, port: int) -> bool:
        return any(port == own_port and _listens_at(host, address) for host, own_port in self.own_addresses)


def _listens_at(host: str, address: Address) -> bool:
    """Whether a socket bound to `host` answers at `address`. A name or a wildcard counts as every local address."""
    try:
        bound = unmapped(ipaddress.ip_address(host))
    except ValueError:
        return _is_local(address)
    return _is_local(address) if bound.is_unspecified else bound == address


def _is_local(address: Address) -> bool:
    """Whether `address` is this machine: the kernel then picks it as the source too. Connecting UDP sends nothing."""
    if address.is_loopback:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            return ipaddress.ip_address(probe.getsockname()[0]) == address
    except OSError:
        return False


def as_addresses(texts: Iterable[str]) -> tuple[Address, ...]:
    """What a resolver answered. Anything that is no address makes the whole answer refused."""
    try:
        return tuple(dict.fromkeys(ipaddress.ip_address(text) for text in texts))
    except ValueError:
        raise egress_refused() from None
