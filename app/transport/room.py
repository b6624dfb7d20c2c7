"""The room that the large bodies of all connections share, and what of it a tenant may take.

A tenant has at most three times what is left free: alone three quarters of the room, two of them three sevenths each,
and there is always some for the next one that comes (dynamic thresholds: Choudhury and Hahne, "Dynamic Queue Length
Thresholds for Shared-Memory Packet Switches", 1998). Only who has another large body under way is asked for its part.
Knows no connection and no caller: the protocol takes room as bytes come, a door says whose they are.
"""

from __future__ import annotations

from collections.abc import Callable

SHARE = "agentcore.share"
"""Key in the scope of a request whose body may be large; the value is the Share of its connection."""

PART = 3
"""Of what is left free."""


class Room:
    """Of one server. `refused` is called for each body that a tenant's part has no room for."""

    __slots__ = ("_of_tenants", "bytes", "bytes_max", "refused")

    def __init__(self, bytes_max: int, refused: Callable[[], None]) -> None:
        self.bytes = 0
        """Of large bodies whose requests have not ended: not answered, nor done where the client has gone."""
        self.bytes_max = bytes_max
        self.refused = refused
        self._of_tenants: dict[str, int] = {}

    def fits(self, body_bytes: int) -> bool:
        """Whether so much more of large bodies may come."""
        return self.bytes + body_bytes <= self.bytes_max

    def of(self, tenant: str) -> int:
        return self._of_tenants.get(tenant, 0)

    def add(self, body_bytes: int, tenant: str | None) -> None:
        """More, or less, of a tenant's; None: nobody has said whose."""
        self.bytes += body_bytes
        if tenant is not None:
            of_tenant = self.of(tenant) + body_bytes
            if of_tenant:
                self._of_tenants[tenant] = of_tenant
            else:
                self._of_tenants.pop(tenant, None)


class Share:
    """What the large bodies of one connection take of the room, and whose they are."""

    __slots__ = ("_room", "_tenant", "bytes", "declared_bytes")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._tenant: str | None = None
        self.bytes = 0
        self.declared_bytes = 0
        """By the head of the last request; negative where it is chunked."""

    def take(self, body_bytes: int) -> bool:
        """Room for what has come, if there is. A peer that declares much and sends little takes little."""
        if not self._room.fits(body_bytes) or self._is_too_much(body_bytes):
            return False
        self._room.add(body_bytes, self._tenant)
        self.bytes += body_bytes
        return True

    def belongs_to(self, tenant: str) -> bool:
        """From now on, and what has come already. False: the request's body would be more than the tenant's part."""
        if tenant != self._tenant:
            self._room.add(-self.bytes, self._tenant)
            self._tenant = tenant
            self._room.add(self.bytes, tenant)
        if self._is_too_much(max(0, self.declared_bytes - self.bytes)):
            self._room.refused()
            return False
        return True

    def give_back(self) -> int:
        """All of it; how much it was."""
        body_bytes, self.bytes = self.bytes, 0
        self._room.add(-body_bytes, self._tenant)
        return body_bytes

    def _is_too_much(self, more_bytes: int) -> bool:
        room = self._room
        if self._tenant is None or room.of(self._tenant) == self.bytes:  # nobody's yet, or the tenant's only one
            return False
        return room.of(self._tenant) + more_bytes > PART * (room.bytes_max - room.bytes - more_bytes)
