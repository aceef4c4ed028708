"""The federation plan: everything that both sides must agree on, in one TOML file at the server.

Clients receive the plan at the handshake; both sides compare `FederationPlan.sha256()`. A client's own
limits (`ClientLimits`) never travel: they say what this client is willing to take part in.

sections.py    the tables of the plan, key by key
federation.py  the whole plan: rules between keys, what follows from it for each client, its hash, differences
robust.py      what a median or a trimmed mean needs of a plan
secure.py      what secure aggregation needs of a plan
trained.py     which segments have trained parameters
trust.py       which channels are open, what may be claimed, and the sentence for every start
limits.py      what a client is willing to take part in, and noise that is stricter than the plan's
loading.py     TOML and JSON to plan and limits, and sentences for what is wrong in them
refusals.py    what is wrong with a value, and what is allowed, in words
"""

from fedsea.plan.federation import FederationPlan, differences
from fedsea.plan.limits import ClientLimits, ClientNoise, ClientSettings
from fedsea.plan.loading import load_limits, load_plan, load_settings, parse_plan, parse_plan_json
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
    NoiseSection,
    OptimizerSection,
    PartitionSection,
    SegmentTraining,
    TrainingSection,
    TrustSection,
    WireSection,
)
from fedsea.plan.trust import backward_channel, no_claim_reason, open_channels, server_statement, trust_statement

__all__ = [
    "AdapterSection",
    "AggregationSection",
    "ClientEntry",
    "ClientLimits",
    "ClientName",
    "ClientNoise",
    "ClientSettings",
    "CodecName",
    "DataSection",
    "DtypeName",
    "DurabilitySection",
    "FederationPlan",
    "InferenceSection",
    "ModelSection",
    "NoiseSection",
    "OptimizerSection",
    "PartitionSection",
    "SegmentTraining",
    "TrainingSection",
    "TrustSection",
    "WireSection",
    "backward_channel",
    "differences",
    "load_limits",
    "load_plan",
    "load_settings",
    "no_claim_reason",
    "open_channels",
    "parse_plan",
    "parse_plan_json",
    "server_statement",
    "trust_statement",
]
