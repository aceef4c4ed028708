"""Secure aggregation: CPU seconds and bytes of a round against the plain mean, by clients and parameters.

Everybody runs in this process, one after the other, with real certificates and the wire's own encoder; what is timed
is each one's own work. The largest share of clients drops out that the threshold allows, half of them before masking,
which is what costs the server most.

    python benchmarks/secure_aggregation.py --out secure_aggregation
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from _harness import arguments, finish

from fedsea.federation.aggregation import mean
from fedsea.federation.secure import Advertisement, Aggregator, FixedPoint, Layout, Member, Phase, Setting
from fedsea.privacy.boundary import Boundary
from fedsea.wire import messages as m
from fedsea.wire.encoding import Encoder
from fedsea.wire.identity import Authority, enroll, install
from fedsea.wire.identity.signing import CertificateVerifier, IdentityNotary

T = TypeVar("T")

_COLUMNS = 1000


class Clock:
    """CPU seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, what: str, call: Callable[[], T]) -> T:
        """Call it, and note what it took."""
        start = time.process_time()
        result = call()
        self.seconds.setdefault(what, []).append(time.process_time() - start)
        return result

    def total(self, *names: str) -> float:
        """Of these, summed."""
        return sum(sum(self.seconds[name]) for name in names)

    def median(self, *names: str) -> float:
        """Of each of these, summed: one client's part."""
        return sum(statistics.median(self.seconds[name]) for name in names)


def notaries(folder: Path, names: tuple[str, ...]) -> dict[str, IdentityNotary]:
    authority = Authority.create(folder / "ca", "benchmark")
    made = {}
    for name in names:
        certificate = authority.approve(enroll(folder / name, name).csr_pem)
        made[name] = IdentityNotary(install(folder / name, certificate.pem, authority.ca_pem, authority.fingerprint))
    return made


class Round:
    """One round of `count` clients that hold `num_values` parameters each."""

    def __init__(self, count: int, num_values: int, signers: dict[str, IdentityNotary], verifier: Any) -> None:
        self.names = tuple(signers)[:count]
        shape = (-(-num_values // _COLUMNS), _COLUMNS)
        self.layout = Layout.of({name: {"adapter": shape} for name in self.names})
        numbers = FixedPoint.of(count, 2**20)
        place = ("run", "ab" * 32, 0, 1)
        self.setting = Setting(*place, self.names, 2 * count // 3 + 1, 2, self.layout, numbers)
        self.members = {name: Member(self.setting, name, signers[name]) for name in self.names}
        self.server = Aggregator(self.setting, self.names, verifier)
        self.base = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        self.weights = {name: 1000 + 7 * index for index, name in enumerate(self.names)}
        self.clock = Clock()
        self.up: dict[str, int] = {}
        self.down: dict[str, int] = {}
        self.encoder = {"up": Encoder("client", {}), "down": Encoder("server", {})}
        away = count - self.setting.threshold
        self.lost = {Phase.MASKED: self.names[: away - away // 2], Phase.CONSENT: self.names[away - away // 2 : away]}

    def value(self, name: str) -> torch.Tensor:
        """A client's parameters."""
        return self.base * (1 + self.names.index(name) / len(self.names))

    def note(self, way: str, name: str, message: Any) -> None:
        """Count a message's bytes."""
        book = self.up if way == "up" else self.down
        book[name] = book.get(name, 0) + self.encoder[way].encode(message).num_bytes

    def play(self) -> dict[str, torch.Tensor]:
        """From keys to the mean."""
        clock, server = self.clock, self.server
        for name in self.names:
            ad = clock("advertise", self.members[name].advertise)
            self.note("up", name, m.SecureKeys(0, 1, *_keys(ad), ad.signature))
            clock("server", lambda a=ad: server.add_keys(a))  # type: ignore[misc]
        server.proceed()
        roster = tuple(server.roster.values())
        columns = zip(*((ad.name, *_keys(ad), ad.signature) for ad in roster), strict=True)
        told = m.SecureRoster(0, 1, *(tuple(column) for column in columns))  # type: ignore[arg-type]
        for name in self.names:
            self.note("down", name, told)
            sealed = clock("share", lambda n=name: self.members[n].share(roster))  # type: ignore[misc]
            self.note("up", name, m.SecureShares(0, 1, tuple(sealed), tuple(sealed.values())))
            clock("server", lambda n=name, s=sealed: server.add_shares(n, s))  # type: ignore[misc]
        server.proceed()
        self._mask()
        for name in self.lost[Phase.CONSENT]:
            server.drop(name)
        for name in server.waiting_for():
            self.note("down", name, m.SecureSurvivors(0, 1, server.survivors))
            signature = clock("consent", lambda n=name: self.members[n].consent(server.survivors))  # type: ignore[misc]
            self.note("up", name, m.SecureConsent(0, 1, signature))
            clock("server", lambda n=name, s=signature: server.add_consent(n, s))  # type: ignore[misc]
        server.proceed()
        for name in server.waiting_for():
            evidence = m.SecureEvidence(0, 1, tuple(server.signatures), tuple(server.signatures.values()))
            self.note("down", name, evidence)
            shares = clock("reveal", lambda n=name: self.members[n].reveal(server.signatures))  # type: ignore[misc]
            self.note("up", name, m.SecureReveal(0, 1, tuple(shares), tuple(shares.values())))
            clock("server", lambda n=name, s=shares: server.add_reveal(n, s))  # type: ignore[misc]
        server.proceed()
        means, _ = clock("unmask", server.unmask)
        return means

    def _mask(self) -> None:
        clock, server, boundary = self.clock, self.server, Boundary("trusted-server")
        for name in self.names:
            if name in self.lost[Phase.MASKED]:
                server.drop(name)
                continue
            member, delivery = self.members[name], server.delivery(name)
            self.note("down", name, m.SecureDelivery(0, 1, tuple(delivery), tuple(delivery.values())))
            clock("receive", lambda d=delivery, one=member: one.receive(d))  # type: ignore[misc]
            update, weight = boundary.maskable({"adapter": self.value(name)}), self.weights[name]

            def masked(values: Any, one: Member = member, weight: int = weight) -> Any:
                return self.layout.to_tensors(one.mask(values, weight))

            release = clock("mask", lambda u=update: u.under(masked))  # type: ignore[misc]
            sealed = self.encoder["up"].seal(release)
            self.note("up", name, m.SecureUpdate(0, 1, sealed))
            pieces = zip(sealed.specs, sealed.pieces, strict=True)
            tensors = {s.name: torch.from_numpy(p).view(torch.int64).view(s.shape) for s, p in pieces}
            clock("add", lambda n=name, t=tensors: server.accumulate(n, t))  # type: ignore[misc]
            server.add_masked(name)
        server.proceed()

    def figures(self) -> dict[str, Any]:
        """Play, and hold it against the plain mean of the same clients."""
        found = self.play()["adapter"]
        names = self.server.survivors
        plain = time.process_time()
        expected = mean([self.value(name) for name in names], [self.weights[name] for name in names])
        plain = time.process_time() - plain
        survivor = names[-1]
        client = ("advertise", "share", "receive", "mask", "consent", "reveal")
        server_s = self.clock.total("server", "add", "unmask")
        update = Boundary("trusted-server").update({"adapter": self.base})
        plain_bytes = self.encoder["up"].encode(m.RoundUpdate(0, 1, update)).num_bytes
        return {
            "clients": len(self.names),
            "parameters": self.base.numel(),
            "threshold": self.setting.threshold,
            "dropped": {"before masking": len(self.lost[Phase.MASKED]), "after": len(self.lost[Phase.CONSENT])},
            "client_cpu_s": self.clock.median(*client),
            "client_cpu_s_masking": self.clock.median("mask"),
            "server_cpu_s": server_s,
            "server_cpu_s_unmasking": self.clock.total("unmask"),
            "server_over_plain_mean": server_s / plain,
            "client_bytes_up": self.up[survivor],
            "client_bytes_up_over_plain": self.up[survivor] / plain_bytes,
            "client_bytes_of_the_protocol": self.up[survivor] + self.down[survivor] - 8 * self.base.numel(),
            "largest_error": float((found.double() - expected.double()).abs().max()),
            "stated_error": self.setting.numbers.error + float(expected.abs().max()) * 2.0**-23,
        }


def _keys(ad: Advertisement) -> tuple[bytes, bytes, bytes, bytes]:
    return ad.certificate, ad.sharing_key, ad.mask_key, ad.commitment


def sizes(options: argparse.Namespace) -> list[tuple[int, int]]:
    if options.tiny:
        return [(4, 10_000)]
    return [(count, values) for count in options.clients for values in options.parameters]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--parameters", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = sizes(options)
    names = tuple(f"c{index}" for index in range(max(count for count, _ in chosen)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        signers = notaries(Path(folder), names)
        verifier = CertificateVerifier((Path(folder) / "ca" / "ca.pem").read_bytes())
        for count, values in chosen:
            rows.append(Round(count, values, signers, verifier).figures())
            print(rows[-1], flush=True)
            assert rows[-1]["largest_error"] <= rows[-1]["stated_error"], "the mean is wrong"
    finish("secure_aggregation", {"tiny": options.tiny, "threads": options.threads}, {"rounds": rows}, options.out)


if __name__ == "__main__":
    main()
