"""Who is who: certificates, their authority, enrolment, renewal, revocation, and why a connection failed.

certificates.py  what a fedsea certificate is, and its fingerprint
building.py      making one
requests.py      signing requests
files.py         private modes, atomic replacement, the folder's lock
folder.py        key and certificate as a pair that a kill cannot part
journal.py       what the authority issued and revoked
renewal.py       when a certificate is renewed without the operator
authority.py     the operator: approve, renew, revoke
identity.py      the holder of a key: load and check
enrollment.py    the holder of a key: request, install, renew
signing.py       statements that clients sign for each other
peers.py         the server's gate
diagnose.py      one sentence about a connection that failed
"""

from fedsea.wire.identity.authority import Authority, ClientCertificate
from fedsea.wire.identity.certificates import Role
from fedsea.wire.identity.diagnose import diagnose, unreachable
from fedsea.wire.identity.enrollment import Enrollment, begin_renewal, enroll, finish_renewal, install
from fedsea.wire.identity.identity import Identity, needs_renewal
from fedsea.wire.identity.peers import PeerGate, PeerIdentity

__all__ = [
    "Authority",
    "ClientCertificate",
    "Enrollment",
    "Identity",
    "PeerGate",
    "PeerIdentity",
    "Role",
    "begin_renewal",
    "diagnose",
    "enroll",
    "finish_renewal",
    "install",
    "needs_renewal",
    "unreachable",
]
