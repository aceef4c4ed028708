"""What runs beside the service: its failure ends the server, and says so."""

from __future__ import annotations

import asyncio

import pytest

from fedsea.cli import options
from fedsea.errors import AuthError, FedseaError, StorageError
from fedsea.server.run import ServerOptions, _beside, serve


async def forever() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("raised", "kind", "sentence"),
    [(RuntimeError("private"), FedseaError, "start the server again"), (StorageError("full"), StorageError, "full")],
)
def test_a_chore_that_fails_stops_the_server_with_a_sentence(caplog, raised, kind, sentence):
    async def fail() -> None:
        raise raised

    with pytest.raises(kind, match=sentence) as caught:
        asyncio.run(asyncio.wait_for(_beside(forever(), forever(), fail()), 5.0))
    assert "private" not in str(caught.value)
    assert "cannot do without" in caplog.text


def test_chores_end_with_the_work():
    ended = []

    async def both() -> None:
        begun = asyncio.Event()

        async def chore() -> None:
            begun.set()
            try:
                await forever()
            finally:
                ended.append(True)

        async def work() -> None:
            await begun.wait()

        await _beside(work(), chore())

    asyncio.run(asyncio.wait_for(both(), 5.0))
    assert ended == [True]


def test_the_works_own_error_is_its_own():
    async def work() -> None:
        raise StorageError("the disk is full")

    with pytest.raises(StorageError, match="disk is full"):
        asyncio.run(asyncio.wait_for(_beside(work(), forever()), 5.0))


def test_an_identity_is_used_as_what_it_is(identities, base_model, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(f"[model]\npath = {str(base_model)!r}\n[[clients]]\nname = 'a'\n")
    given = ServerOptions(plan, "127.0.0.1:0", identity=identities / "a", ca=identities / "ca", run=tmp_path / "run")
    with pytest.raises(AuthError, match=r"identity of the client a, not of a server.*fedsea ca server"):
        serve(given)
    assert not given.run.exists()
    with pytest.raises(AuthError, match=r"identity of the server .*, not of a client.*fedsea enroll"):
        options.need_identity(identities / "server")
    options.need_identity(identities / "a")
    options.need_identity(identities / "server", "server")
