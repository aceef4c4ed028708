"""Secure aggregation (Bonawitz et al., CCS 2017): the server learns the sum of the clients' parameters, and no summand.

messages.py     what members and server tell each other, and what is signed of it
layout.py       which parameters are summed over which clients, and the round's setting
fixed_point.py  weighted values as integers mod 2^64, with a stated error
masks.py        keys of a pair, and keystreams that are added to words
shamir.py       a secret in shares, of which some suffice
member.py       a client's part of one attempt
aggregator.py   the server's part of one attempt
freshness.py    whether masks were used twice, or not at all; for the audit
"""

from fedsea.federation.secure.aggregator import Aggregator, Phase
from fedsea.federation.secure.fixed_point import FixedPoint
from fedsea.federation.secure.freshness import Finding, Transcript, check_fresh
from fedsea.federation.secure.layout import Group, Layout, Setting
from fedsea.federation.secure.member import Member
from fedsea.federation.secure.messages import Advertisement, Notary, Verifier

__all__ = [
    "Advertisement",
    "Aggregator",
    "Finding",
    "FixedPoint",
    "Group",
    "Layout",
    "Member",
    "Notary",
    "Phase",
    "Setting",
    "Transcript",
    "Verifier",
    "check_fresh",
]
