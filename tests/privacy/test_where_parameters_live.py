"""Which parameters a server's and a client's process hold in memory, and which code a server's."""

from __future__ import annotations

from tests.support.processes import Fault, modules_of_a_server


def test_the_server_holds_no_embedding_or_head_and_the_client_no_trunk(federation):
    fed = federation("a", training={"rounds": 1, "steps_per_round": 1})
    server = fed.spawn_server(Fault("fedsea.server.steps:StepRunner._finish", action="census"))
    client = fed.spawn_client("a", Fault("fedsea.client.state:ClientStore.prepare", action="census"))
    at_server, at_client = server.wait_for("census"), client.wait_for("census")
    for child in (client, server):
        child.finish()

    def blocks(names: list[str]) -> set[str]:
        return {name.split(".")[2] for name in names if name.startswith("model.layers.")}

    assert blocks(at_server) == {"1", "2", "3"}
    assert all(name.startswith("model.layers.") for name in at_server)
    assert blocks(at_client) == {"0", "4"}
    others = {name for name in at_client if not name.startswith("model.layers.")}
    assert others == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_server_imports_neither_text_nor_privacy():
    """As imported at run time, beside what import-linter says of the source."""
    found = modules_of_a_server()
    assert "fedsea.server.run" in found
    assert [name for name in found if name.startswith(("fedsea.data", "fedsea.privacy", "fedsea.client"))] == []
