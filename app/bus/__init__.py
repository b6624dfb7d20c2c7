"""Messages between replicas: cancel a call wherever it runs, forget results."""

from app.bus.bus import Bus, Message

__all__ = ["Bus", "Message"]
