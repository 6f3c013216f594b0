"""What a cache's numbers and its traffic mean: findings in plain words, each with its evidence and what to change."""

from pasture.observe.findings import Finding
from pasture.observe.requests import LoggedRequest, Message, read_log
from pasture.observe.running import TEMPLATE_PROBE, examine_server, examine_template
from pasture.observe.traffic import examine_traffic
from pasture.observe.working_set import pool_too_small

__all__ = [
    "TEMPLATE_PROBE",
    "Finding",
    "LoggedRequest",
    "Message",
    "examine_server",
    "examine_template",
    "examine_traffic",
    "pool_too_small",
    "read_log",
]
