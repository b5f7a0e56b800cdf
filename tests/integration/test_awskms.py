"""Keys in KMS with real processes: the signer, beside it KMS over HTTP, and an enclave that must not care."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from signer import crypto
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature
from tests.integration.conftest import Setup, attestation, running, wait_for
from tests.kms_server import CREDENTIALS, REGION, Kms, environment, serving

ALLOW = {"allow": {"block": None, "attestation": None, "preattestation": None}}


@pytest.fixture
def kms() -> Iterator[Kms]:
    with serving() as server:
        yield server


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory, kms: Kms) -> Iterator[Setup]:
    """A setup whose only vault is KMS."""
    with running(tmp_path_factory.mktemp("k")) as setup:
        use(setup, kms)
        setup.top["vaults"] = {"kms": setup.vaults["kms"]}
        yield setup


def use(setup: Setup, kms: Kms, **options: object) -> None:
    setup.environment |= environment(kms.url, setup.directory)
    setup.vaults["kms"] = {"driver": "awskms", "config": {**CREDENTIALS, **options}}


def address(kms: Kms, arn: str) -> str:
    """As KMS's own public key has it."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

    key = load_der_public_key(kms.backend.keys[arn.rpartition("/")[2]].private_key.public_key())
    if isinstance(key, ec.EllipticCurvePublicKey):
        curve = Curve.P256 if isinstance(key.curve, ec.SECP256R1) else Curve.SECP256K1
        return str(PublicKey(curve, key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)).hash)
    return str(PublicKey(Curve.ED25519, key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hash)


def signed(setup: Setup, pkh: str, level: int) -> str:
    """A signature of an attestation, verified; the attestation's slot was free, or it has these bytes."""
    message = attestation(PublicKeyHash.from_base58(pkh).curve, level)
    status, answer = setup.api.sign(pkh, message)
    assert status == 200, answer
    key = PublicKey.from_base58(setup.api.get(f"/keys/{pkh}")[1]["public_key"])
    assert crypto.verify(key, message, Signature.from_base58(answer["signature"]))
    return str(answer["signature"])


@pytest.mark.parametrize("spec", ["ECC_SECG_P256K1", "ECC_NIST_P256", "ECC_NIST_EDWARDS25519"])
def test_sign_again_conflict_and_restart(alone: Setup, kms: Kms, spec: str) -> None:
    """KMS makes another signature each time; the same bytes get the same one all the same."""
    pkh = address(kms, kms.add(spec))
    alone.policies[pkh] = ALLOW
    alone.write_config()
    process = alone.start_signer()
    first = [signed(alone, pkh, level) for level in range(1, 20)]
    again = signed(alone, pkh, 19)
    assert again == first[-1]
    curve = PublicKeyHash.from_base58(pkh).curve
    assert alone.api.sign(pkh, attestation(curve, 19, payload=1))[0] == 409
    assert alone.stop(process) == 0
    alone.start_signer()
    assert signed(alone, pkh, 19) == again
    assert alone.api.sign(pkh, attestation(curve, 18))[0] == 409
    assert "SECRET" not in alone.log.read_text()


def test_the_listing_and_its_labels(alone: Setup, kms: Kms) -> None:
    arn = kms.add("ECC_SECG_P256K1", alias="alias/baker", tags={"Name": "delegate"})
    kms.add("RSA_2048")
    kms.add("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT")
    alone.write_config()
    done = alone.run("list")
    assert done.returncode == 0, done.stderr
    assert f"Reference:                 {arn}\nAliases:                   [alias/baker]\n" in done.stdout.decode()
    assert "Tags:                      [Name=delegate]\nVault:                     AWSKMS\n" in done.stdout.decode()
    assert done.stdout.count(b"Public Key Hash:") == 1
    kms.denied |= {"ListAliases", "ListResourceTags"}
    (key,) = json.loads(alone.run("list", "--json").stdout)
    assert (key["reference"], key["vault"], key["vault_name"]) == (arn, "AWSKMS", "kms")
    assert "aliases" not in key


def test_what_kms_cannot_do_is_said(alone: Setup, kms: Kms) -> None:
    kms.add("ECC_NIST_P256")
    alone.write_config()
    done = alone.run("generate", "-v", "kms", "-t", "p256")
    assert done.returncode == 1
    assert b"import: vault kms doesn't support generate operation" in done.stderr
    done = alone.run("import", "-v", "kms", "edsk4FTF78Qf1m2rykGpHqostAiq5gYW4YZEoGUSWBTJr2njsDHSnd")
    assert done.returncode == 1
    assert b"import: vault kms doesn't support import operation" in done.stderr


def test_unfit_and_denied_keys_are_skipped_over_two_pages(alone: Setup, kms: Kms) -> None:
    arns = [kms.add(("ECC_SECG_P256K1", "ECC_NIST_P256")[number % 2]) for number in range(120)]
    unfit = [
        kms.add("RSA_2048"),
        kms.add("ECC_NIST_P384"),
        kms.add("HMAC_256", "GENERATE_VERIFY_MAC"),
        kms.add("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT"),
        kms.add("ML_DSA_65"),
    ]
    kms.backend.keys[arns[3].rpartition("/")[2]].enabled = False
    kms.backend.keys[arns[4].rpartition("/")[2]].key_state = "PendingDeletion"
    kms.denied.add(arns[5].rpartition("/")[2])
    first, last = address(kms, arns[0]), address(kms, arns[-1])
    alone.policies |= {first: ALLOW, last: ALLOW}
    alone.write_config()
    alone.start_signer()
    assert signed(alone, first, 1)
    assert signed(alone, last, 1)
    status, health = alone.utility.get("/healthz")
    assert (status, health["vaults"]["kms"]["keys"]) == (200, 117)
    skipped = health["vaults"]["kms"]["skipped"]
    assert skipped.keys() == {*unfit, arns[3], arns[4], arns[5]}
    assert skipped[arns[3]].startswith("DisabledException")
    assert "the role needs kms:GetPublicKey on " + arns[5] in skipped[arns[5]]
    assert skipped[unfit[0]] == "KeySpec RSA_2048: Tezos has no such keys"


def test_named_keys_with_the_least_of_permissions(alone: Setup, kms: Kms) -> None:
    arn = kms.add("ECC_SECG_P256K1", alias="alias/baker")
    pkh = address(kms, arn)
    kms.denied |= {"ListKeys", "ListAliases", "ListResourceTags", "DescribeKey"}
    use(alone, kms, keys=["alias/baker"])
    alone.top["vaults"] = {"kms": alone.vaults["kms"]}
    alone.policies[pkh] = ALLOW
    alone.write_config()
    alone.start_signer()
    assert signed(alone, pkh, 1)
    assert {action for action, _ in kms.calls} == {"GetPublicKey", "Sign"}


@pytest.mark.parametrize("fault", ["throttled", "unavailable", "lost"])
def test_what_is_over_within_the_deadline_costs_no_slot(alone: Setup, kms: Kms, fault: str) -> None:
    pkh = address(kms, kms.add("ECC_SECG_P256K1"))
    alone.policies[pkh] = ALLOW
    alone.write_config()
    alone.start_signer()
    coming = [fault, fault]
    kms.choose = lambda action, _key: coming.pop() if action == "Sign" and coming else ""
    assert signed(alone, pkh, 1)
    assert kms.count("Sign") == 3


def test_a_fault_that_stays_is_502_and_the_slot_is_signed_afterwards(alone: Setup, kms: Kms) -> None:
    pkh = address(kms, kms.add("ECC_SECG_P256K1"))
    alone.policies[pkh] = ALLOW
    alone.write_config()
    alone.start_signer()
    message = attestation(Curve.SECP256K1, 1)
    for fault, text in (("throttled", "Rate exceeded"), ("lost", "no answer"), ("held", "no answer")):
        kms.choose = lambda action, _key, fault=fault: fault if action == "Sign" else ""  # type: ignore[misc]
        began = time.monotonic()
        status, answer = alone.api.sign(pkh, message)
        assert status == 502
        assert text in json.dumps(answer)
        assert time.monotonic() - began < 4
    kms.choose = lambda *_: ""
    kms.hold.set()
    assert signed(alone, pkh, 1)
    assert alone.api.sign(pkh, attestation(Curve.SECP256K1, 1, payload=1))[0] == 409


def test_a_denied_signature_says_what_is_missing(alone: Setup, kms: Kms) -> None:
    arn = kms.add("ECC_SECG_P256K1")
    pkh = address(kms, arn)
    alone.policies[pkh] = ALLOW
    alone.write_config()
    alone.start_signer()
    kms.denied.add("Sign")
    status, answer = alone.api.sign(pkh, attestation(Curve.SECP256K1, 1))
    assert status == 500
    assert f"the role needs kms:Sign on {arn}" in json.dumps(answer)
    assert kms.count("Sign") == 1


def test_kms_gone_for_a_second_costs_no_slot(alone: Setup, kms: Kms) -> None:
    pkh = address(kms, kms.add("ECC_NIST_P256"))
    alone.policies[pkh] = ALLOW
    alone.write_config()
    alone.start_signer()
    assert signed(alone, pkh, 1)
    kms.choose = lambda *_: "dropped"
    back = threading.Timer(1.0, lambda: setattr(kms, "choose", lambda *_: ""))
    back.start()
    assert signed(alone, pkh, 2)
    back.join()


def test_sighup_takes_up_a_new_key(alone: Setup, kms: Kms) -> None:
    old = address(kms, kms.add("ECC_NIST_P256"))
    alone.policies[old] = ALLOW
    alone.write_config()
    process = alone.start_signer()
    new = address(kms, kms.add("ECC_NIST_P256"))
    alone.policies[new] = ALLOW
    alone.write_config()
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: alone.api.request("GET", f"/keys/{new}")[0] == 200, "the new key")
    wait_for(lambda: alone.api.sign(new, attestation(Curve.P256, 1))[0] == 200, "its policy")


def test_unknown_hashes_do_not_make_kms_work(alone: Setup, kms: Kms) -> None:
    """Weakness 30: `GET /keys/...` needs no authentication."""
    kms.add("ECC_NIST_P256")
    alone.write_config()
    alone.start_signer()
    began = time.monotonic()
    for number in range(100):
        assert alone.api.request("GET", f"/keys/{PublicKeyHash(Curve.P256, number.to_bytes(20, 'big'))}")[0] == 404
    assert kms.count("ListKeys") <= 2 + (time.monotonic() - began) / 10
    assert kms.count("GetPublicKey") == 1


def test_the_wrong_region_is_named(alone: Setup, kms: Kms) -> None:
    arn = kms.add("ECC_SECG_P256K1").replace(REGION, "us-east-1")
    use(alone, kms, keys=[arn])
    alone.environment["AWS_REGION"] = REGION
    del alone.vaults["kms"]["config"]["region"]
    alone.top["vaults"] = {"kms": alone.vaults["kms"]}
    alone.write_config()
    alone.start_signer()
    status, health = alone.utility.get("/healthz")
    assert status == 503
    assert f"the resource is in us-east-1, and the client asks in {REGION}" in health["vaults"]["kms"]["skipped"][arn]


# -- two vaults


def test_one_configuration_with_a_delegate_in_kms_and_a_companion_in_the_enclave(setup: Setup, kms: Kms) -> None:
    delegate = address(kms, kms.add("ECC_SECG_P256K1"))
    (companion,) = setup.generate("bls")
    use(setup, kms)
    setup.policies[delegate] = ALLOW
    setup.write_config()
    setup.start_signer()
    for level in range(1, 5):
        assert signed(setup, delegate, level).startswith("spsig1")
        assert signed(setup, companion, level).startswith("BLsig")
    assert setup.utility.get("/healthz") == (200, {"ready": True})


@pytest.mark.parametrize("fault", ["denied", "held"])
def test_what_kms_does_is_nothing_to_the_enclave(setup: Setup, kms: Kms, fault: str) -> None:
    """Weakness 32: one vault's listing error fails the reference's lookups of all keys."""
    delegate = address(kms, kms.add("ECC_SECG_P256K1"))
    (companion,) = setup.generate("bls")
    use(setup, kms)
    setup.policies[delegate] = ALLOW
    setup.write_config()
    kms.choose = lambda *_: fault
    setup.start_signer()
    for level in range(1, 6):
        began = time.monotonic()
        assert signed(setup, companion, level)
        assert time.monotonic() - began < 1
    status, answer = setup.api.sign(delegate, attestation(Curve.SECP256K1, 1))
    assert status == 502
    assert "vault kms" in json.dumps(answer) or "kms:" in json.dumps(answer)
    health = setup.utility.get("/healthz")[1]["vaults"]
    assert (health["nitro"]["ready"], health["kms"]["ready"]) == (True, False)
    kms.choose = lambda *_: ""
    kms.hold.set()
    wait_for(lambda: setup.api.sign(delegate, attestation(Curve.SECP256K1, 2))[0] == 200, "KMS is back")
    assert signed(setup, companion, 6)
