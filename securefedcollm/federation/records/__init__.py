"""What the round loops write into their evidence logs, one record for each role."""

from securefedcollm.federation.records.authority import AuthorityRecord
from securefedcollm.federation.records.common import SERVER
from securefedcollm.federation.records.server import ServerRecord
from securefedcollm.federation.records.silo import MOST_HEADS, SiloRecord

__all__ = ["MOST_HEADS", "SERVER", "AuthorityRecord", "ServerRecord", "SiloRecord"]
