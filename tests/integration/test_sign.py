"""The spine: a real signer, a real enclave process, real HTTP, every curve."""

import json
import re
import signal
import socket
import stat

import pytest

from signer import crypto
from signer.tezos.keys import Curve, PublicKey, Signature
from tests.integration.conftest import Setup, attestation, wait_for

CURVES = dict(zip(("tz1", "tz2", "tz3", "tz4"), Curve, strict=True))


@pytest.mark.parametrize("kind", list(CURVES))
def test_an_attestation_with_every_curve(setup: Setup, kind: str) -> None:
    (pkh,) = setup.generate(kind)
    signer = setup.start_signer()
    curve = CURVES[kind]
    status, answer = setup.api.get(f"/keys/{pkh}")
    assert status == 200
    key = PublicKey.from_base58(answer["public_key"])
    assert str(key.hash) == pkh

    message = attestation(curve, 1000)
    status, answer = setup.api.sign(pkh, message)
    assert status == 200
    assert crypto.verify(key, message, Signature.from_base58(answer["signature"]))
    assert setup.api.sign(pkh, message) == (200, answer), "the same bytes get the same signature"

    status, refusal = setup.api.sign(pkh, attestation(curve, 1000, payload=1))
    assert status == 409
    assert refusal[0]["id"] == "failure"
    assert "attestation level 1000 and round 0 already signed with different data" in refusal[0]["msg"]
    status, refusal = setup.api.sign(pkh, attestation(curve, 999))
    assert "attestation level 999 below high watermark 1000" in refusal[0]["msg"]
    assert setup.api.sign(pkh, attestation(curve, 1000, round_=1))[0] == 200
    status, refusal = setup.api.sign(pkh, attestation(curve, 1000))
    assert "not above high watermark (1000,1)" in refusal[0]["msg"]

    assert setup.stop(signer) == 0
    setup.start_signer()
    assert setup.api.sign(pkh, attestation(curve, 1000))[0] == 409, "marks outlive the process"
    assert setup.api.sign(pkh, attestation(curve, 1000, round_=1))[0] == 200


def test_routes_and_statuses(setup: Setup) -> None:
    (pkh,) = setup.generate("tz4")
    (other,) = setup.generate("tz1")
    setup.policies[other] = None
    setup.server["known_keys"] = True
    setup.write_config()
    setup.start_signer()
    api = setup.api
    assert api.request("GET", "/authorized_keys")[1] == b"{}\n"
    assert api.get("/known_keys") == (200, {"known_keys": sorted([pkh, other])})
    assert api.request("GET", f"//keys//{pkh}")[0] == 200
    status, body, headers = api.request("GET", "/nowhere")
    assert (status, body, headers["content-type"]) == (404, b"404 page not found\n", "text/plain; charset=utf-8")
    assert api.request("GET", f"/keys/{pkh}/")[0] == 404
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE"):
        assert api.request(method, f"/keys/{pkh}")[:2] == (405, b"")
    status, answer = api.get(f"/bls_prove_possession/{pkh}")
    key = PublicKey.from_base58(api.get(f"/keys/{pkh}")[1]["public_key"])
    assert crypto.verify_possession(key, Signature.from_base58(answer["bls_prove_possession"]))
    status, answer = api.get(f"/bls_prove_possession/{pkh}?bls_pk={key}&x=y")
    assert crypto.verify_possession(key, Signature.from_base58(answer["bls_prove_possession"]), over=key)
    status, answer = api.get(f"/bls_prove_possession/{other}")
    assert status == 400
    assert "proof of possession is not allowed" in answer[0]["msg"]

    message = attestation(Curve.BLS12_381, 5)
    assert api.sign(pkh, message, "?version=0")[0] == 400
    assert api.sign(pkh, message, "?version=1")[1][0]["msg"].startswith("gotez: unknown tag 41")
    assert api.sign(pkh, message)[0] == 200, "a refused version moves no mark"
    for body, text in (
        (b"null", "can't sign empty data"),
        (b'"0g"', "encoding/hex: invalid byte: U+0067 'g'"),
        (b'"0"', "encoding/hex: odd length hex string"),
        (b"{}", "cannot unmarshal object"),
        (b"", "EOF"),
        (b'"', "invalid JSON"),
    ):
        status, answer_body, headers = api.request("POST", f"/keys/{pkh}", body)
        assert status == 400
        assert headers["content-type"] == "application/json; charset=utf-8"
        assert text in json.loads(answer_body)[0]["msg"]
    unknown = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
    assert api.sign(unknown, message) == (
        403,
        [{"id": "failure", "kind": "temporary", "msg": f"{unknown} is not listed in config"}],
    )
    assert api.get(f"/keys/{unknown}")[0] == 404
    assert api.get("/keys/tz1bad")[0] == 400
    generic = b"\x03" + bytes(32) + b"\x11\x00\x00\x00\x00"
    status, answer = api.sign(pkh, generic)
    assert (status, answer[0]["msg"]) == (403, "request kind `generic' is not allowed")


def test_limits_of_a_request(setup: Setup) -> None:
    (pkh,) = setup.generate("tz1")
    setup.server |= {"max_body_bytes": 4096, "body_timeout": 0.5, "header_timeout": 0.5}
    setup.write_config()
    setup.start_signer()
    status, body, _ = setup.api.request("POST", f"/keys/{pkh}", b'"' + b"0" * 300_000 + b'"')
    assert (status, json.loads(body)[0]["msg"]) == (413, "the request's body is larger than 4096 bytes")
    head = f"POST /keys/{pkh} HTTP/1.1\r\nhost: x\r\n".encode()
    with socket.create_connection(("127.0.0.1", setup.port), timeout=20) as slow:
        slow.sendall(head)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408"), "a head that isn't finished ends the connection"
        assert slow.recv(1000) == b""
    with socket.create_connection(("127.0.0.1", setup.port), timeout=20) as slow:
        slow.sendall(head + b"content-length: 100\r\n\r\n")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", setup.port), timeout=20) as garbage:
        garbage.sendall(b"\x16\x03\x01 not HTTP\r\n\r\n")
        assert garbage.recv(1000).startswith(b"HTTP/1.1 400")
    message = json.dumps(attestation(Curve.ED25519, 1).hex()).encode()
    chunked = (
        head + b"transfer-encoding: chunked\r\n\r\n" + f"{len(message):x}\r\n".encode() + message + b"\r\n0\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", setup.port), timeout=20) as client:
        client.sendall(chunked + chunked)  # pipelined, too
        received = b""
        while received.count(b'"signature"') < 2:
            chunk = client.recv(65536)
            assert chunk
            received += chunk


def test_policy_of_the_configuration(setup: Setup) -> None:
    first, second, third = setup.generate("tz2", 3)
    setup.policies[first] = None
    setup.policies[second] = {}
    setup.policies[third] = {"allow": {"attestation": None}, "allowed_chains": ["NetXnHfVqm9iesp"]}
    setup.write_config()
    setup.start_signer()
    message = attestation(Curve.SECP256K1, 7)
    assert setup.api.sign(first, message)[0] == 200
    assert setup.api.sign(second, message)[1][0]["msg"] == "request kind `attestation' is not allowed"
    assert setup.api.sign(third, message)[1][0]["msg"] == "chain `NetXdQprcVkpaWU' is not allowed"
    assert setup.api.sign(third, attestation(Curve.SECP256K1, 7, chain=b"\xaf\x18\x64\xd9"))[0] == 200


def test_health_and_metrics(setup: Setup) -> None:
    (pkh,) = setup.generate("tz3")
    setup.start_signer()
    assert setup.utility.get("/healthz") == (200, {"ready": True})
    assert setup.utility.get("/livez")[0] == 200
    setup.api.sign(pkh, attestation(Curve.P256, 1))
    setup.api.sign(pkh, attestation(Curve.P256, 1, payload=1))
    setup.api.sign("tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q", b"\x13")
    text = setup.utility.request("GET", "/metrics")[1].decode()
    chain, vault, conflict = "NetXdQprcVkpaWU", 'vault="NitroEnclave"', 'reason="conflict"'
    for line in (
        f'sign_handler_requests_total{{address="{pkh}",status="OK"}} 1.0',
        f'sign_handler_requests_total{{address="{pkh}",status="Conflict"}} 1.0',
        'sign_handler_requests_total{address="unknown",status="Forbidden"} 1.0',
        f'signing_ops_total{{address="{pkh}",chain_id="{chain}",kind="attestation",op="attestation",{vault}}} 1.0',
        f'watermark_rejection_total{{address="{pkh}",chain_id="{chain}",operation_type="attestation",{conflict}}} 1.0',
        'watermark_operations_total{backend="file",request_type="attestation",result="rejected"} 1.0',
        'vault_sign_request_error_total{chain_id="NetXdQprcVkpaWU",code="409",vault="NitroEnclave"} 1.0',
        'vault_up{vault="nitro"} 1.0',
    ):
        assert line in text
    log = setup.log.read_text()
    (signed,) = re.findall(r'.*msg="Signed attestation successfully".*', log)
    assert f"pkh={pkh}" in signed
    assert "lvl=1 round=0" in signed
    assert "outcome=signed" in signed
    (refused,) = re.findall(r'.*msg="Error signing request: watermark.*', log)
    assert "rule=watermark standing_level=1 standing_round=0" in refused
    assert attestation(Curve.P256, 1).hex() not in log, "payloads only with log_payloads"


def test_an_enclave_that_comes_back(setup: Setup) -> None:
    """Down at start, up later, killed, up again: the signer carries on by itself, and no failure moves a mark."""
    first, second = setup.generate("tz1", 2)
    enclave = setup.processes[0]
    setup.stop(enclave, signal.SIGKILL)
    setup.nitro["wait_timeout"] = 0.3
    setup.write_config()
    setup.start_signer()
    status, health = setup.utility.get("/healthz")
    assert status == 503
    assert not health["vaults"]["nitro"]["ready"]
    status, answer = setup.api.sign(first, attestation(Curve.ED25519, 10))
    assert status == 502, "the Octez client repeats this one by itself"
    assert "nobody" in answer[0]["msg"] or "refused" in answer[0]["msg"]

    enclave = setup.start_enclave()
    wait_for(lambda: setup.utility.get("/healthz")[0] == 200, "the vault")
    assert setup.api.sign(first, attestation(Curve.ED25519, 10, payload=1))[0] == 200, "the failure moved no mark"
    setup.stop(enclave, signal.SIGKILL)
    assert setup.api.sign(second, attestation(Curve.ED25519, 10))[0] == 502
    setup.start_enclave()
    wait_for(lambda: setup.api.sign(second, attestation(Curve.ED25519, 10, payload=2))[0] == 200, "a signature")


def test_a_key_generated_beside_a_running_server_is_usable_at_once(setup: Setup) -> None:
    setup.generate("tz1")
    setup.start_signer()
    done = setup.run("generate", "-v", "nitro", "-t", "tz4", "--json")
    (made,) = json.loads(done.stdout)
    status, answer = setup.api.get(f"/keys/{made['public_key_hash']}")
    assert (status, answer["public_key"]) == (200, made["public_key"])


def test_a_bad_blob_is_skipped_and_reported(setup: Setup) -> None:
    first, second, third = setup.generate("tz1", 3)
    path = setup.base_dir / "enclave_keys.json"
    entries = json.loads(path.read_text())
    entries[0]["encrypted_private_key"] = "AQID"
    entries[1]["encrypted_private_key"] = entries[2]["encrypted_private_key"]  # swapped: another key's blob
    path.write_text(json.dumps(entries, indent=4))
    setup.start_signer()
    status, health = setup.utility.get("/healthz")
    assert status == 200
    assert set(health["vaults"]["nitro"]["skipped"]) == {first, second}
    assert third in health["vaults"]["nitro"]["skipped"][second]
    assert setup.api.sign(third, attestation(Curve.ED25519, 1))[0] == 200
    for refused in (first, second):  # it is no unknown key, and KMS may be back soon: the client asks again
        status, answer = setup.api.sign(refused, attestation(Curve.ED25519, 1))
        assert status == 502
        assert health["vaults"]["nitro"]["skipped"][refused] in answer[0]["msg"]


def test_files_are_private(setup: Setup) -> None:
    setup.generate("tz1")
    setup.start_signer()
    assert stat.S_IMODE(setup.base_dir.stat().st_mode) == 0o700
    for name in ("watermarks.db", "enclave_keys.json"):
        assert stat.S_IMODE((setup.base_dir / name).stat().st_mode) == 0o600
