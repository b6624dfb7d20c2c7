"""The only way out for tools: one guarded HTTP client.

Every hop is parsed (`targets`), resolved once, judged at every address (`rules`) and connected to a judged one
(`network`); redirects, bytes, inflation and time are bounded (`client`). Whatever goes wrong is a ToolError whose
text names neither host nor address.
"""

from app.egress.client import EgressClient, EgressResponse, OriginBreakers
from app.egress.rules import EgressAllow, parse_egress_allow

__all__ = ["EgressAllow", "EgressClient", "EgressResponse", "OriginBreakers", "parse_egress_allow"]
