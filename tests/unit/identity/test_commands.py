"""`fedsea ca` and `fedsea enroll`: the whole way by hand, as operator and client would go it."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from fedsea.cli import ca, enroll
from fedsea.errors import AuthError, ConfigError, FedseaError
from fedsea.wire.identity import Identity, PeerGate

app = typer.Typer()
app.add_typer(ca.app, name="ca")
app.command("enroll")(enroll.enroll)


@pytest.fixture
def fedsea(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(command: str, answer: str = "") -> str:
        result = CliRunner().invoke(app, command.split(), input=answer)
        if isinstance(result.exception, FedseaError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


def listed(fedsea) -> dict:
    return json.loads(fedsea("ca list --json"))


def test_a_client_gets_in_and_is_thrown_out_by_hand(fedsea, tmp_path):
    fedsea("ca init --host fedsea.example.org")
    asked = fedsea("enroll --name clinic")
    approved = fedsea("ca approve identity/clinic.request.pem", answer="y\n")
    fingerprint = asked.split("in person:\n")[1].split()[0]
    assert fingerprint in approved
    fedsea(f"enroll --install identity/clinic.certificate.pem --ca-fingerprint {listed(fedsea)['ca_fingerprint']}")
    identity = Identity.load(tmp_path / "identity")
    assert PeerGate(tmp_path / "ca").check(identity.certificate_pem).name == "clinic"
    fedsea("ca revoke clinic")
    with pytest.raises(AuthError, match="revoked"):
        PeerGate(tmp_path / "ca").check(identity.certificate_pem)


def test_an_operator_who_says_no_approves_nothing(fedsea):
    fedsea("ca init")
    fedsea("enroll --name clinic")
    result = CliRunner().invoke(app, ["ca", "approve", "identity/clinic.request.pem"], input="n\n")
    assert result.exit_code == 1
    assert str(result.exception) == "Not approved; nothing was written."
    assert [row["role"] for row in listed(fedsea)["certificates"]] == ["server"]


def test_a_revoked_name_is_refused_before_the_operator_is_asked_for_its_fingerprint(fedsea):
    fedsea("ca init")
    fedsea("enroll --name clinic")
    fedsea("ca approve identity/clinic.request.pem --yes")
    fedsea("ca revoke clinic")
    result = CliRunner().invoke(app, ["ca", "approve", "identity/clinic.request.pem"], input="y\n")
    assert "--again" in str(result.exception)
    assert "same fingerprint" not in result.output
    fedsea("ca approve identity/clinic.request.pem --again", answer="y\n")


def test_a_given_fingerprint_approves_without_asking_only_if_it_is_the_same(fedsea):
    fedsea("ca init")
    fingerprint = fedsea("enroll --name clinic").split("in person:\n")[1].split()[0]
    with pytest.raises(AuthError, match="approve nothing"):
        fedsea(f"ca approve identity/clinic.request.pem --fingerprint {fingerprint[:-2]}00")
    fedsea(f"ca approve identity/clinic.request.pem --fingerprint {fingerprint}")


def test_a_question_that_nobody_can_answer_says_what_a_script_gives(fedsea):
    fedsea("ca init")
    fedsea("enroll --name clinic")
    with pytest.raises(ConfigError, match="--fingerprint"):
        fedsea("ca approve identity/clinic.request.pem")
    assert [row["role"] for row in listed(fedsea)["certificates"]] == ["server"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("ca approve folder", "is a folder: give the path of the request"),
        ("enroll --install folder --ca-fingerprint AB", "is a folder: give the path of the file"),
        ("enroll --name clinic --folder file", "a file is there; choose another folder"),
        ("ca init --folder file", "a file is there; choose another folder"),
        ("ca list --folder file", "a part of the path is a file"),
    ],
)
def test_a_folder_in_place_of_a_file_and_the_other_way_round(fedsea, tmp_path, command, says):
    fedsea("ca init")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FedseaError, match=says):
        fedsea(command)


def test_a_request_that_was_approved_before_is_said_to_be(fedsea):
    fedsea("ca init")
    fedsea("enroll --name clinic")
    assert "approved before" not in fedsea("ca approve identity/clinic.request.pem --yes")
    assert "approved before" in fedsea("ca approve identity/clinic.request.pem --yes")


def test_enrolling_ends_with_the_file_to_send(fedsea, tmp_path):
    fedsea("enroll --name clink")
    last = fedsea("enroll --name clinic").splitlines()[-1]
    assert last == "Now send identity/clinic.request.pem to the operator."
    assert [path.name for path in (tmp_path / "identity").glob("*request*")] == ["clinic.request.pem"]


def test_a_second_key_for_a_name_is_pointed_out(fedsea):
    fedsea("ca init")
    fedsea("enroll --name clinic")
    fedsea("ca approve identity/clinic.request.pem --yes")
    fedsea("enroll --name clinic --folder other")
    assert "already has 1 valid certificate" in fedsea("ca approve other/clinic.request.pem --yes")


def test_the_list_for_people_names_every_certificate(fedsea):
    fedsea("ca init --host localhost")
    fedsea("enroll --name clinic")
    fedsea("ca approve identity/clinic.request.pem --yes")
    output = fedsea("ca list")
    assert "localhost" in output
    assert "clinic" in output


def test_the_list_keeps_names_and_serials_whole_at_80_columns(fedsea, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    hosts = ["fedsea.hospital-network.example.org", "192.0.2.10", "localhost"]
    fedsea("ca init " + " ".join(f"--host {host}" for host in hosts))
    fedsea("enroll --name clinic")
    fedsea("ca approve identity/clinic.request.pem --yes")
    lines = [line.split() for line in fedsea("ca list").splitlines()]
    until = listed(fedsea)["certificates"][1]["not_after"].replace("T", " ")[:16].split()
    assert lines[1] == [hosts[0], "server", "valid", *until]
    assert lines[2:5] == [[hosts[1]], [hosts[2]], [listed(fedsea)["certificates"][0]["serial"]]]
    assert lines[5:7] == [["clinic", "client", "valid", *until], [listed(fedsea)["certificates"][1]["serial"]]]


def test_the_list_keeps_names_and_serials_whole_where_there_is_no_room_for_a_table(fedsea, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    host = "fedsea.hospital-network.example.org"
    fedsea(f"ca init --host {host} --host localhost")
    lines = fedsea("ca list").splitlines()
    until = listed(fedsea)["certificates"][0]["not_after"].replace("T", " ")[:16]
    assert lines[:3] == [host, "localhost", listed(fedsea)["certificates"][0]["serial"]]
    assert lines[3] == f"server, valid, until {until} UTC"


def test_the_server_is_renewed_for_the_same_hosts(fedsea):
    fedsea("ca init --host fedsea.example.org")
    assert "fedsea.example.org" in fedsea("ca server")


def test_scripts_read_json_alone_from_stdout(fedsea):
    def said(command: str) -> dict:
        result = CliRunner().invoke(app, command.split())
        return json.loads(result.stdout)

    fingerprint = said("ca init --host localhost --json")["ca_fingerprint"]
    asked = said("enroll --name clinic --json")
    approved = said(f"ca approve {asked['request']} --fingerprint {asked['fingerprint']} --json")
    installed = said(f"enroll --install {approved['file']} --ca-fingerprint {fingerprint} --json")
    assert installed == {"name": "clinic", "serial": approved["serial"], "not_after": approved["not_after"]}
    assert said("ca server --json")["hosts"] == ["localhost"]
    assert said("ca revoke clinic --json") == {"name": "clinic", "revoked": [approved["serial"]]}
    assert said("ca revoke clinic --json") == {"name": "clinic", "revoked": []}


def test_installing_needs_the_fingerprint(fedsea):
    with pytest.raises(ConfigError, match="--ca-fingerprint"):
        fedsea("enroll --install some.pem")


def test_enrolling_needs_a_name_or_an_answer(fedsea):
    with pytest.raises(ConfigError, match="--name"):
        fedsea("enroll")


@pytest.mark.parametrize("command", ["ca init", "ca approve", "ca revoke", "ca list", "ca server", "enroll"])
def test_help_shows_an_example(fedsea, command):
    assert f"fedsea {command}" in fedsea(f"{command} --help")
