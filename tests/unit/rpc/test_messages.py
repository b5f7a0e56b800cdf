"""The wire, byte for byte: the frames of section 4.4, the samples of 4.5, and hostile CBOR."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.rpc import messages
from signer.rpc._cbor import dumps, loads
from signer.rpc.frames import encode_frame
from signer.rpc.messages import (
    Attest,
    Attested,
    AttestKey,
    Call,
    Created,
    Generate,
    GenerateAndImport,
    Import,
    Imported,
    ImportSealed,
    ImportUnencrypted,
    Initialize,
    InitializeSealed,
    MalformedCallError,
    MalformedReplyError,
    ProvePossession,
    PublicKeyFrom,
    PublicKeyOf,
    RemoteError,
    Reseal,
    Sign,
    SignWith,
    decode_call,
    decode_credentials,
    decode_reply,
    encode_call,
    encode_credentials,
    encode_error,
    encode_reply,
)
from signer.tezos.keys import Curve, PublicKey, Signature

SEED = bytes.fromhex("cfe0c48fe7530d3aba4f5b3a9b33073251691a83fbc1ab248db31c42ec2b9703")
PUBLIC = PublicKey(Curve.ED25519, bytes.fromhex("b9dfece6122726b04976b23a69d54729816cebde72eebd521b2b8d5a6ad891b6"))
SCALAR = bytes.fromhex("552d23f1c7a26e14301fd17681831f11a37fce2a9958fdce3d48c2133b914303")
MESSAGE = bytes.fromhex("030000")

CALLS: list[tuple[Call, str]] = [
    (
        Initialize(
            access_key_id="AKID",
            secret_access_key="SECRET",
            session_token="TOKEN",
            encryption_key_id="$7qdfdac.8e9-4f40-9747-f56d4091acfe",
            region="us-west-2",
        ),
        "",
    ),
    (Import(b"\1\2\3"), "0000000ca166496d706f727443010203"),
    (
        ImportUnencrypted(Curve.ED25519, SEED),
        (
            "0000003ea171496d706f7274556e656e63727970746564a167456432353531395820cfe0c48fe7530d3aba4f5b3a9b3307325169"
            "1a83fbc1ab248db31c42ec2b9703"
        ),
    ),
    (
        ImportUnencrypted(Curve.BLS12_381, SCALAR),
        (
            "0000003aa171496d706f7274556e656e63727970746564a163426c735820552d23f1c7a26e14301fd17681831f11a37fce2a9958"
            "fdce3d48c2133b914303"
        ),
    ),
    (Generate(Curve.BLS12_381), "0000000ea16847656e657261746563426c73"),
    (GenerateAndImport(Curve.P256), "0000001ca17147656e6572617465416e64496d706f7274684e69737450323536"),
    (
        Sign(0, MESSAGE, 2),
        "00000024a1645369676ea36668616e646c6500676d657373616765430300006776657273696f6e02",
    ),
    (
        SignWith(b"\1\2\3", MESSAGE, 2),
        (
            "0000003aa1685369676e57697468a375656e637279707465645f707269766174655f6b657943010203676d657373616765430300"
            "006776657273696f6e02"
        ),
    ),
    (PublicKeyOf(0), "0000000ca1695075626c69634b657900"),
    (PublicKeyFrom(b"\1\2\3"), "00000013a16d5075626c69634b657946726f6d43010203"),
    (ProvePossession(0), "00000012a16f50726f7665506f7373657373696f6e00"),
    (
        Attest("session", b"\1" * 16),
        "00000030a166417474657374a267707572706f73656773657373696f6e656e6f6e63655001010101010101010101010101010101",
    ),
    (
        Attest("import", b"\1" * 64, b"who"),
        (
            "0000006ea166417474657374a367707572706f736566696d706f7274656e6f6e63655840"
            + "01" * 64
            + "69757365725f64617461"
            "4377686f"
        ),
    ),
    (
        ImportSealed(b"\2" * 32, b"\3" * 32, b"\4\5", "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"),
        (
            "00000097a16c496d706f72745365616c6564a4636b65795820" + "02" * 32 + "63656e635820" + "03" * 32 + "6a63697068"
            "6572746578744204056761646472657373"
            "7824747a314c67675832485564764a3174463446767638666a73727a4c6557344a7239743251"
        ),
    ),
    (
        ImportSealed(b"\2" * 32, b"\3" * 32, b"\4\5", "tz1L", "arn:t"),
        (
            "00000082a16c496d706f72745365616c6564a5636b65795820" + "02" * 32 + "63656e635820" + "03" * 32 + "6a63697068"
            "657274657874420405676164647265737364747a314c656d61726b736561726e3a74"
        ),
    ),
    (
        AttestKey(3, b"\1" * 16),
        "0000002ba1694174746573744b6579a26668616e646c6503656e6f6e63655001010101010101010101010101010101",
    ),
    (Reseal(b"\1\2\3"), "0000000ca16652657365616c43010203"),
    (
        InitializeSealed(b"\2" * 32, b"\3" * 32, b"\4\5"),
        (
            "0000006da170496e697469616c697a655365616c6564a3636b65795820"
            + "02" * 32
            + "63656e635820"
            + "03" * 32
            + "6a6369"
            "706865727465787442" + "0405"
        ),
    ),
]
INITIALIZE = (
    "00000096a16a496e697469616c697a65a56d6163636573735f6b65795f696464414b4944717365637265745f6163636573735f6b657966534543"
    "5245546d73657373696f6e5f746f6b656e65544f4b454e71656e6372797074696f6e5f6b65795f69647824373731646664"
    "61632d653865392d346634302d393734372d66353664303931316663653466726567696f6e6975732d776573742d32"
)
SIGNATURE = Signature.from_base58(
    "edsigtuRwihvmjUkXsNXix1isC4aEaHjwSqL4csc2cQrcqufFmDkVsWdqWT1t15NVjVSfcJMzqvcXnyA1EGy1BgQCt6ZQxSDk9Y"
)


@pytest.mark.parametrize(("call", "frame"), CALLS[1:], ids=lambda value: type(value).__name__)
def test_calls_byte_for_byte(call: Call, frame: str) -> None:
    assert encode_frame(encode_call(call)).hex() == frame
    assert decode_call(bytes.fromhex(frame)[4:]) == call


def test_initialize_byte_for_byte() -> None:
    call = decode_call(bytes.fromhex(INITIALIZE)[4:])
    assert isinstance(call, Initialize)
    assert (call.access_key_id, call.secret_access_key, call.session_token) == ("AKID", "SECRET", "TOKEN")
    assert call.region == "us-west-2"
    assert encode_frame(encode_call(call)).hex() == INITIALIZE
    assert "SECRET" not in repr(call)
    assert "TOKEN" not in repr(call)
    without = Initialize(access_key_id="a", secret_access_key="b", encryption_key_id="c", region="d")
    assert b"session_token" not in encode_call(without)
    assert decode_call(encode_call(without)) == without
    assert decode_call(dumps({"Initialize": {}})) == Initialize()


def test_initialize_asks_for_a_version_and_for_an_update() -> None:
    """At the end of the map, where tee-signer ignores them."""
    plain = Initialize(access_key_id="a", secret_access_key="b", encryption_key_id="c", region="d")
    call = replace(plain, seal="v1", update=True)
    head = encode_call(plain).replace(b"Initialize\xa4", b"Initialize\xa6")
    assert encode_call(call) == head + b"\x64seal\x62v1" + b"\x66update\xf5"
    assert decode_call(encode_call(call)) == call
    assert decode_call(dumps({"Initialize": {"seal": None, "update": False}})) == Initialize()
    faults: list[dict[str, object]] = [{"seal": "v2"}, {"seal": 1}, {"seal": {}}, {"update": 1}, {"update": "true"}]
    for bad in faults:
        with pytest.raises(MalformedCallError, match="is (v1|true)"):
            decode_call(dumps({"Initialize": bad}))


def test_the_credentials_alone() -> None:
    call = Initialize(access_key_id="a", secret_access_key="SECRET", session_token="t", seal="v1", update=True)
    assert loads(encode_call(call)) == {"Initialize": loads(encode_credentials(call))}
    assert decode_credentials(encode_credentials(call)) == call
    encoded = encode_credentials(call)
    for end in range(len(encoded)):
        with pytest.raises(MalformedCallError) as caught:
            decode_credentials(encoded[:end])
        assert "SECRET" not in str(caught.value)
    for bad in (dumps([1]), dumps({"region": 5}), dumps({1: 2}), b"\xff", dumps("SECRET")):
        with pytest.raises(MalformedCallError) as caught:
            decode_credentials(bad)
        assert "SECRET" not in str(caught.value)


LIMITS: list[tuple[str, dict[str, object], str]] = [
    ("Attest", {"purpose": "import", "nonce": b"\1" * 4}, "nonce must have 16 to 64 bytes"),
    ("Attest", {"purpose": "import", "nonce": b"\1" * 15}, "nonce must have 16 to 64 bytes"),
    ("Attest", {"purpose": "import", "nonce": b"\1" * 65}, "nonce must have 16 to 64 bytes"),
    ("Attest", {"purpose": "import"}, "nonce is a byte string or an array of integers 0 to 255"),
    ("Attest", {"purpose": "key", "nonce": b"\1" * 16}, "purpose is session or import"),
    ("Attest", {"purpose": 5, "nonce": b"\1" * 16}, "purpose is session or import"),
    ("Attest", {"nonce": b"\1" * 16}, "purpose is session or import"),
    (
        "Attest",
        {"purpose": "session", "nonce": b"\1" * 16, "user_data": bytes(257)},
        "user_data must have at most 256 bytes",
    ),
    ("AttestKey", {"handle": 0, "nonce": b"\1" * 15}, "nonce must have 16 to 64 bytes"),
    ("AttestKey", {"handle": -1, "nonce": b"\1" * 16}, "handle is an unsigned integer"),
]
SEALED: dict[str, object] = {
    "key": bytes(32),
    "enc": bytes(32),
    "ciphertext": bytes(4096),
    "address": "tz1",
    "marks": "arn",
}
for _name, _value, _text in (
    ("key", bytes(31), "key has 32 bytes, not 31"),
    ("enc", bytes(33), "enc has 32 bytes, not 33"),
    ("ciphertext", bytes(4097), "ciphertext must have at most 4096 bytes"),
    ("address", "", "address must have 1 to 64 printable ASCII characters"),
    ("address", "t" * 65, "address must have 1 to 64 printable ASCII characters"),
    ("address", "tz1\0", "address must have 1 to 64 printable ASCII characters"),
    ("address", "tz\u00e9", "address must have 1 to 64 printable ASCII characters"),
    ("address", None, "address is a text"),
    ("marks", "a" * 321, "marks must have 1 to 320 printable ASCII characters"),
    ("marks", b"arn", "marks is a text"),
):
    LIMITS.append(("ImportSealed", SEALED | {_name: _value}, _text))
    if _name in ("key", "enc", "ciphertext"):
        LIMITS.append(("InitializeSealed", SEALED | {_name: _value}, _text))


@pytest.mark.parametrize(("name", "argument", "text"), LIMITS)
def test_limits_of_the_calls_around_attestation(name: str, argument: dict[str, object], text: str) -> None:
    with pytest.raises(MalformedCallError) as caught:
        decode_call(dumps({name: argument}))
    assert str(caught.value) == text


def test_the_refused_example_of_the_specification() -> None:
    with pytest.raises(MalformedCallError, match="^nonce must have 16 to 64 bytes$"):
        decode_call(bytes.fromhex("a166417474657374a267707572706f736566696d706f7274656e6f6e63654401010101"))


def test_what_just_fits() -> None:
    assert decode_call(dumps({"ImportSealed": SEALED})) == ImportSealed(bytes(32), bytes(32), bytes(4096), "tz1", "arn")
    for length in (16, 64):
        call = Attest("session", bytes(length), bytes(256))
        assert decode_call(encode_call(call)) == call
    assert decode_call(dumps({"Attest": {"purpose": "session", "nonce": bytes(16), "user_data": None}})) == Attest(
        "session", bytes(16)
    )


def test_a_document_comes_back() -> None:
    document = bytes(range(256)) * 18  # over 4,096 bytes, as real ones
    for call in (Attest("session", bytes(16)), AttestKey(0, bytes(16))):
        reply = encode_reply(Attested(document))
        assert reply == b"\xa1\x62Ok\xa1\x68document\x59\x12\x00" + document
        assert decode_reply(call, reply) == Attested(document)
        for bad in (None, {}, {"document": "text"}, document):
            with pytest.raises(MalformedReplyError):
                decode_reply(call, dumps({"Ok": bad}))


@pytest.mark.parametrize(
    ("messages_", "unknown"),
    [
        (("unknown call, expected one of Initialize, Import",), True),
        (("unknown variant `Attest`, expected one of `Initialize`, `Import`",), True),
        (('Semantic(None, "unknown variant `Attest`, expected one of `Initialize`, `Import`")',), True),
        (("uninitialized",), False),
        (("nonce must have 16 to 64 bytes",), False),
        (("attestation error", "unknown call"), False),
        (("unknown call", "with a cause"), False),
    ],
)
def test_an_enclave_that_does_not_know_a_call(messages_: tuple[str, ...], unknown: bool) -> None:
    with pytest.raises(RemoteError) as caught:
        decode_reply(Attest("session", bytes(16)), encode_error(*messages_))
    assert caught.value.unknown_call is unknown


def test_our_own_decoder_is_recognised() -> None:
    with pytest.raises(MalformedCallError) as malformed:
        decode_call(dumps({"SealCredentials": {}}))
    with pytest.raises(RemoteError) as caught:
        decode_reply(Reseal(b""), encode_error(str(malformed.value)))
    assert caught.value.unknown_call


def test_secrets_stay_out_of_reprs() -> None:
    assert SEED.hex() not in repr(ImportUnencrypted(Curve.ED25519, SEED))
    assert repr(SEED)[4:10] not in repr(ImportUnencrypted(Curve.ED25519, SEED))


def test_replies_byte_for_byte() -> None:
    imported = Imported(PUBLIC, 0)
    created = Created(b"\1\2\3", PUBLIC, 0)
    for call, result, frame in (
        (Initialize(), None, "00000005a1624f6bf6"),
        (
            Import(b""),
            imported,
            (
                "00000043a1624f6ba26a7075626c69635f6b6579a167456432353531395820b9dfece6122726b04976b23a69d54729816cebde72"
                "eebd521b2b8d5a6ad891b66668616e646c6500"
            ),
        ),
        (
            GenerateAndImport(Curve.ED25519),
            created,
            (
                "0000005da1624f6ba375656e637279707465645f707269766174655f6b6579430102036a7075626c69635f6b6579a16745643235"
                "3531395820b9dfece6122726b04976b23a69d54729816cebde72eebd521b2b8d5a6ad891b66668616e646c6500"
            ),
        ),
        (
            Sign(0, b"", 2),
            SIGNATURE,
            (
                "00000088a1624f6ba16745643235353139984018a5184818a51837081843187f185a18d318c618b8182b18b61218c31891182e18"
                "1918b1182a183518ec18e11854184818ef187d18ee18900e182518cc1878183618f218f5131318c5181b181b18f418bd182b1879"
                "189418721843184518f018d018a41867188d1840183e0b18f2183918a21841187c186907"
            ),
        ),
    ):
        assert encode_frame(encode_reply(result)).hex() == frame
        assert decode_reply(call, bytes.fromhex(frame)[4:]) == result


def test_errors_byte_for_byte() -> None:
    chain = "00000042a163457272a2676d6573736167656c7369676e6572206572726f7266736f75726365a2676d6573736167656e696e7661"
    chain += "6c69642068616e646c6566736f75726365f6"
    assert encode_frame(encode_error("signer error", "invalid handle")).hex() == chain
    with pytest.raises(RemoteError) as caught:
        decode_reply(Sign(0, b"", 2), bytes.fromhex(chain)[4:])
    assert str(caught.value) == "signer error: invalid handle"
    single = "00000024a163457272a2676d6573736167656d756e696e697469616c697a656466736f75726365f6"
    assert encode_frame(encode_error("uninitialized")).hex() == single
    with pytest.raises(RemoteError, match="^only$"):
        decode_reply(PublicKeyOf(0), dumps({"Err": {"message": "only"}}))


def test_samples_of_the_past_that_still_parse() -> None:
    error = "a163457272a2676d657373616765686d6573736167653066736f75726365a2"
    error += "676d657373616765686d6573736167653166736f75726365f6"
    with pytest.raises(RemoteError, match="message0: message1"):
        decode_reply(PublicKeyOf(0), bytes.fromhex(error))
    bls = (
        "a1624f6ba163426c73986018a61893181818e718ed1836185c0d14183c189618f318990618fa18ec18641822182b18c118531856011857183e"
        "18c31899187a187118f3183818da18ab18361867188818e71839188d18aa0001186115185918ca1839182f01189a181918bb18e20818841837"
        "18a518a509183818d118631881183d1850184318a3185918c905189d18f618d818f61618fa185e188718260a183d18f81018cf18f10f184d18"
        "c518bf186c189b1877182c186e186a1855"
    )
    signature = decode_reply(Sign(0, b"", 2), bytes.fromhex(bls))
    assert isinstance(signature, Signature)
    assert signature.data.hex().startswith("a69318e7")
    assert signature.data.hex().endswith("2c6e6a55")
    assert decode_call(bytes.fromhex("a166496d706f727489000102030405060708")) == Import(bytes(range(9)))


def test_long_messages_travel_as_arrays() -> None:
    for length, head in ((4096, b"\x59\x10\x00"), (4097, b"\x99\x10\x01")):
        call = Sign(7, bytes(length), 2)
        encoded = encode_call(call)
        assert b"message" + head in encoded
        assert decode_call(encoded) == call


@given(st.binary(max_size=60))
def test_hostile_bytes_are_one_documented_error(data: bytes) -> None:
    with pytest.raises(MalformedCallError):
        decode_call(data)
    with pytest.raises((MalformedReplyError, RemoteError)):
        decode_reply(Sign(0, b"", 2), data)


@pytest.mark.parametrize("call", [call for call, _ in CALLS], ids=lambda value: type(value).__name__)
def test_every_truncation_and_addition_is_refused(call: Call) -> None:
    encoded = encode_call(call)
    for end in range(len(encoded)):
        with pytest.raises(MalformedCallError):
            decode_call(encoded[:end])
    with pytest.raises(MalformedCallError, match="after the item"):
        decode_call(encoded + b"\0")


@pytest.mark.parametrize(
    "data",
    [
        b"\x81" * 100_000 + b"\0",
        bytes.fromhex("5b7fffffffffffffff00"),
        bytes.fromhex("9b7fffffffffffffff00"),
        bytes.fromhex("a2645369676e00645369676e00"),
        dumps({"Sign": {"handle": -1, "message": b"", "version": 2}}),
        dumps({"Sign": {"handle": True, "message": b"", "version": 2}}),
        dumps({"Sign": {"handle": 0, "message": "text", "version": 2}}),
        dumps({"Sign": {"handle": 0, "message": [256], "version": 2}}),
        dumps({"Sign": {"handle": 0, "message": ["a"], "version": 2}}),
        dumps({"Sign": {"handle": 0, "message": b"", "version": 3}}),
        dumps({"Sign": {"handle": 0, "message": b""}}),
        dumps({"Sign": 5}),
        dumps({"Generate": "Rsa"}),
        dumps({"Generate": 1}),
        dumps({"ImportUnencrypted": {"Ed25519": bytes(31)}}),
        dumps({"ProvePossession": {"handle": 0, "public_key": {"Ed25519": bytes(32)}}}),
        dumps({"Terminate": None}),
        dumps("Sign"),
        dumps({1: 2}),
    ],
)
def test_malformed_calls(data: bytes) -> None:
    with pytest.raises(MalformedCallError):
        decode_call(data)


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (Initialize(), {"Ok": 1}),
        (Import(b""), {"Ok": {"handle": 0}}),
        (Import(b""), {"Ok": {"public_key": {"Ed25519": bytes(31)}, "handle": 0}}),
        (Import(b""), {"Ok": {"public_key": {"Ed25519": bytes(32)}, "handle": "0"}}),
        (GenerateAndImport(Curve.P256), {"Ok": {"public_key": {"Ed25519": bytes(32)}, "encrypted_private_key": b""}}),
        (Sign(0, b"", 2), {"Ok": {"Ed25519": bytes(63)}}),
        (Sign(0, b"", 2), {"Ok": {"Bls": bytes(64)}}),
        (Sign(0, b"", 2), {"Ok": None}),
        (Sign(0, b"", 2), {"Maybe": None}),
        (Sign(0, b"", 2), {"Err": None}),
        (Sign(0, b"", 2), {"Err": {"source": None}}),
        (Sign(0, b"", 2), {"Err": {"message": 5}}),
    ],
)
def test_malformed_replies(call: Call, value: object) -> None:
    with pytest.raises(MalformedReplyError):
        decode_reply(call, dumps(value))


def test_an_endless_error_chain_is_cut() -> None:
    chain: object = None
    for number in range(20):
        chain = {"message": str(number), "source": chain}
    with pytest.raises(RemoteError) as caught:
        decode_reply(PublicKeyOf(0), dumps({"Err": chain}))
    assert len(caught.value.chain.messages) == messages.MAX_CAUSES


def test_prove_possession_over_another_key() -> None:
    call = ProvePossession(3, b"\5" * 48)
    assert decode_call(encode_call(call)) == call
    assert loads(encode_call(call)) == {"ProvePossession": {"handle": 3, "public_key": {"Bls": b"\5" * 48}}}


def test_generate_has_no_handle() -> None:
    created = Created(b"blob", PUBLIC, None)
    assert decode_reply(Generate(Curve.ED25519), encode_reply(created)) == created
    assert decode_reply(PublicKeyOf(0), encode_reply(PUBLIC)) == PUBLIC


# -- binary fields as arrays of integers


def as_arrays(value: object) -> object:
    """*value* with every byte string written as an array of integers, as ciborium and serde may do."""
    if isinstance(value, bytes):
        return list(value)
    if isinstance(value, dict):
        return {name: as_arrays(one) for name, one in value.items()}
    return value


def as_strings(value: object) -> object:
    if isinstance(value, list):
        return bytes(value)
    if isinstance(value, dict):
        return {name: as_strings(one) for name, one in value.items()}
    return value


KEYS_OF_ALL_CURVES = [
    PublicKey(curve, bytes([curve.value] * length)) for curve, length in zip(Curve, (32, 33, 33, 48), strict=True)
]
SIGNATURES = [
    Signature(curve, bytes([curve.value] * length)) for curve, length in zip(Curve, (64, 64, 64, 96), strict=True)
]


@pytest.mark.parametrize(
    "call",
    [
        *(call for call, _ in CALLS),
        *(ImportUnencrypted(curve, bytes(range(32))) for curve in Curve),
        Import(bytes(5000)),
        Import(b""),
        Sign(3, bytes(5000), 0),
        SignWith(bytes(5000), bytes(5000), 255),
        PublicKeyFrom(bytes(5000)),
        ProvePossession(0, bytes(48)),
    ],
    ids=lambda call: type(call).__name__,
)
def test_calls_with_arrays_and_with_byte_strings(call: Call) -> None:
    item = loads(encode_call(call))
    assert decode_call(dumps(as_arrays(item))) == call
    assert decode_call(dumps(as_strings(item))) == call


@pytest.mark.parametrize(
    ("call", "result"),
    [
        *((Sign(0, b"", 2), signature) for signature in SIGNATURES),
        (SignWith(b"", b"", 2), SIGNATURES[0]),
        (ProvePossession(0), SIGNATURES[3]),
        *((PublicKeyOf(0), key) for key in KEYS_OF_ALL_CURVES),
        (PublicKeyFrom(b""), KEYS_OF_ALL_CURVES[1]),
        *((Import(b""), Imported(key, 7)) for key in KEYS_OF_ALL_CURVES),
        *((GenerateAndImport(key.curve), Created(bytes(300), key, 7)) for key in KEYS_OF_ALL_CURVES),
        *((Generate(key.curve), Created(bytes(5000), key, None)) for key in KEYS_OF_ALL_CURVES),
        (ImportUnencrypted(Curve.P256, bytes(32)), Created(b"\1", KEYS_OF_ALL_CURVES[2], 0)),
        (ImportSealed(bytes(32), bytes(32), b"", "tz1"), Created(b"\1", KEYS_OF_ALL_CURVES[2], 0)),
        (Reseal(b""), Created(b"\1", KEYS_OF_ALL_CURVES[3], None)),
        (Attest("import", bytes(16)), Attested(bytes(5000))),
        (AttestKey(1, bytes(16)), Attested(b"document")),
        (InitializeSealed(bytes(32), bytes(32), b""), None),
    ],
)
def test_replies_with_arrays_and_with_byte_strings(call: Call, result: messages.Result) -> None:
    item = loads(encode_reply(result))
    assert decode_reply(call, dumps(as_arrays(item))) == result
    assert decode_reply(call, dumps(as_strings(item))) == result


@pytest.mark.parametrize("bad", [256, -1, 2**70, -(2**70), 1.0, None, "1", b"\1", [1], float("nan")])
def test_arrays_that_are_no_bytes(bad: object) -> None:
    with pytest.raises(MalformedCallError):
        decode_call(dumps({"Import": [0, bad]}))
    with pytest.raises(MalformedReplyError):
        decode_reply(Sign(0, b"", 2), dumps({"Ok": {"Ed25519": [*bytes(63), bad]}}))
    with pytest.raises(MalformedReplyError):
        decode_reply(PublicKeyOf(0), dumps({"Ok": {"Bls": [bad, *bytes(47)]}}))
