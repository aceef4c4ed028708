"""The federation plan: everything that both sides must agree on, in one TOML file at the server.

Clients receive the plan at the handshake; both sides compare `FederationPlan.sha256()`. A client's own
limits (`ClientLimits`) never travel: they say what this client is willing to take part in.

sections.py    the tables of the plan, key by key
federation.py  the whole plan: rules between keys, what follows from it for each client, its hash, differences
limits.py      what a client is willing to take part in
loading.py     TOML and JSON to plan and limits, and sentences for what is wrong in them
"""

from fedsea.plan.federation import FederationPlan, differences
from fedsea.plan.limits import ClientLimits
from fedsea.plan.loading import load_limits, load_plan, parse_plan, parse_plan_json
from fedsea.plan.sections import (
    AdapterSection,
    AggregationSection,
    ClientEntry,
    ClientName,
    CodecName,
    DataSection,
    DtypeName,
    DurabilitySection,
    InferenceSection,
    ModelSection,
    OptimizerSection,
    PartitionSection,
    SegmentTraining,
    TrainingSection,
    TrustSection,
    WireSection,
)

__all__ = [
    "AdapterSection",
    "AggregationSection",
    "ClientEntry",
    "ClientLimits",
    "ClientName",
    "CodecName",
    "DataSection",
    "DtypeName",
    "DurabilitySection",
    "FederationPlan",
    "InferenceSection",
    "ModelSection",
    "OptimizerSection",
    "PartitionSection",
    "SegmentTraining",
    "TrainingSection",
    "TrustSection",
    "WireSection",
    "differences",
    "load_limits",
    "load_plan",
    "parse_plan",
    "parse_plan_json",
]
