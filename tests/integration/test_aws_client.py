"""The client of AWS over real HTTP: credentials of its own, and what a network does to calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from signer.aws.client import AwsClient, AwsError, AwsUnavailableError
from signer.config.models import AwsCredentials
from tests import metadata_server
from tests.integration.conftest import free_port
from tests.kms_server import CREDENTIALS, CUTS, GARBLED, REGION, Kms, environment, serving
from tests.metadata_server import Metadata


@pytest.fixture
def kms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kms]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with serving() as server:
        for name, value in environment(server.url, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server


def client(credentials: dict[str, str] = CREDENTIALS, **options: Any) -> AwsClient:
    return AwsClient("kms", AwsCredentials.model_validate(credentials), component="vault kms", **options)


def first_faults(kms: Kms, *faults: str) -> None:
    """Let the next requests meet *faults*, and those that follow none."""
    coming = list(faults)
    kms.choose = lambda _action, _key: coming.pop(0) if coming else ""


async def test_a_call_is_answered(kms: Kms) -> None:
    arn = kms.add("ECC_SECG_P256K1")
    assert (await client().call("GetPublicKey", resource=arn, KeyId=arn))["KeyId"] == arn
    assert kms.regions == {REGION}


async def test_the_configured_credentials_stay_with_their_client(kms: Kms) -> None:
    """Weakness 31: nothing is exported, so a second client doesn't inherit the first one's token or region."""
    before = dict(os.environ)
    one = client({**CREDENTIALS, "session_token": "TOKEN-1", "region": "eu-west-1"})
    other = client({**CREDENTIALS, "region": "us-east-2"})
    await one.call("ListKeys")
    await other.call("ListKeys")
    assert kms.regions == {"eu-west-1", "us-east-2"}
    assert kms.tokens == {"TOKEN-1", ""}
    assert dict(os.environ) == before
    assert (one.region, other.region) == ("eu-west-1", "us-east-2")


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
async def test_what_is_not_configured_comes_from_the_environment(
    kms: Kms, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "TOKEN")
    monkeypatch.setenv(variable, "ap-south-1")
    asking = client({})
    await asking.call("ListKeys")
    assert (kms.regions, kms.tokens) == ({"ap-south-1"}, {"TOKEN"})
    assert asking.region == "ap-south-1"


async def test_a_configured_key_takes_no_token_of_the_environment(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "TOKEN")
    await client().call("ListKeys")
    assert kms.tokens == {""}


async def test_a_configured_token_without_a_key_is_not_mixed_with_another_key(
    kms: Kms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    await client({"session_token": "TOKEN", "region": REGION}).call("ListKeys")
    assert kms.tokens == {""}


async def test_a_profile_of_the_shared_files(kms: Kms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aws-credentials").write_text("[baker]\naws_access_key_id=AKID\naws_secret_access_key=SECRET\n")
    (tmp_path / "aws-config").write_text("[profile baker]\nregion=eu-north-1\n")
    monkeypatch.setenv("AWS_PROFILE", "baker")
    await client({}).call("ListKeys")
    assert kms.regions == {"eu-north-1"}


async def test_without_credentials_the_places_are_named(kms: Kms) -> None:
    with pytest.raises(AwsError, match="neither the configuration, nor the environment") as caught:
        await client({"region": REGION}).call("ListKeys")
    assert not isinstance(caught.value, AwsUnavailableError)
    assert kms.calls == []


async def test_without_a_region_the_setting_is_named(kms: Kms) -> None:
    with pytest.raises(AwsError, match="set region in the configuration, or AWS_REGION"):
        await client({"access_key_id": "A", "secret_access_key": "S"}).call("ListKeys")
    assert kms.calls == []


@pytest.fixture
def metadata(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    with metadata_server.serving() as server:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
        yield server


async def test_the_role_of_the_instance(kms: Kms, metadata: Metadata) -> None:
    asking = client({"region": REGION})
    await asking.call("ListKeys")
    await asking.call("ListKeys")
    assert kms.tokens == {"TOKEN-1"}
    assert metadata.given == 1


async def test_the_role_of_a_container_and_its_renewal(
    kms: Kms, metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{metadata.url}/container")
    metadata.lifetime = timedelta(minutes=5)  # within the time in which botocore insists on new ones
    asking = client({"region": REGION})
    await asking.call("ListKeys")
    await asking.call("ListKeys")
    assert len(kms.tokens) == 2


@pytest.mark.parametrize("inside", [True, False])
async def test_a_hop_too_many_is_said_in_a_container(
    kms: Kms, metadata: Metadata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    mark = tmp_path / ".dockerenv"
    monkeypatch.setattr("signer.aws.client._CONTAINER_MARKS", (str(mark),))
    if inside:
        mark.touch()
    metadata.mute = True
    with pytest.raises(AwsError, match="nor the instance's role") as caught:
        await client({"region": REGION}).call("ListKeys")
    assert ("--http-put-response-hop-limit 2" in str(caught.value)) is inside


@pytest.fixture
def web_identity(metadata: Metadata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Metadata:
    (tmp_path / "token").write_text("ey.ey.ey")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/baker")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", metadata.url)
    return metadata


async def test_a_web_identity(kms: Kms, web_identity: Metadata) -> None:
    await client({"region": REGION}).call("ListKeys")
    assert kms.tokens == {"TOKEN-1"}


async def test_a_web_identity_that_is_refused(kms: Kms, web_identity: Metadata) -> None:
    web_identity.refuses = True
    with pytest.raises(AwsError, match="credentials: AssumeRoleWithWebIdentity: AccessDenied: Not authorized"):
        await client({"region": REGION}).call("ListKeys")
    assert kms.tokens == set()


async def test_an_sts_that_hangs_holds_no_thread_for_minutes(
    kms: Kms, web_identity: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread that needs credentials would wait for the one that asks for them, until none is left."""
    monkeypatch.setattr("signer.aws.client._STS_TIMEOUTS", (0.2, 0.2))
    web_identity.mute = True
    asking = client({"region": REGION})
    with pytest.raises(AwsUnavailableError, match="Read timeout on endpoint URL"):
        await asking.call("ListKeys")
    web_identity.mute = False
    assert await asking.call("ListKeys")


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "/none/token", "AWS_ROLE_ARN": "arn:aws:iam::111122223333:role/b"},
            "none/token",
        ),
        ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://10.1.2.3/"}, "settings or credentials .*Unsupported host"),
        ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "{metadata}/list"}, "settings or credentials .*TypeError"),
        ({"AWS_ENDPOINT_URL_KMS": "vpce-1.kms"}, "settings or credentials .*Invalid endpoint: vpce-1.kms"),
        ({"AWS_METADATA_SERVICE_NUM_ATTEMPTS": "abc"}, "settings or credentials .*'abc'"),
    ],
)
async def test_what_the_sdk_trips_over_is_an_error_of_the_call(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch, setting: dict[str, str], text: str
) -> None:
    """Not of the process, which has other vaults; botocore raises FileNotFoundError, ValueError and the like."""
    for name, value in setting.items():
        monkeypatch.setenv(name, value.format(metadata=metadata.url))
    own = CREDENTIALS if "AWS_ENDPOINT_URL_KMS" in setting else {"region": REGION}
    with pytest.raises(AwsError, match=text):
        await client(own).call("ListKeys")


async def test_a_length_that_is_told_twice_is_no_length(kms: Kms) -> None:
    """A proxy may have added its own; what comes out of urllib3 is "2, 2"."""
    kms.choose = lambda *_: "length twice"
    assert await client().call("ListKeys")
    assert kms.count("ListKeys") == 1


async def test_credentials_that_come_later_are_found(kms: Kms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signer.aws.client._RENEWAL", 0.0)
    asking = client({"region": REGION})
    with pytest.raises(AwsError, match="credentials"):
        await asking.call("ListKeys")
    (tmp_path / "aws-credentials").write_text("[default]\naws_access_key_id=AKID\naws_secret_access_key=SECRET\n")
    assert await asking.call("ListKeys")


async def test_expired_credentials_are_looked_up_anew(
    kms: Kms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has written a new token to the shared file; botocore alone would keep the old one for good."""
    monkeypatch.setattr("signer.aws.client._RENEWAL", 0.0)
    shared = tmp_path / "aws-credentials"
    template = "[default]\naws_access_key_id=AKID\naws_secret_access_key=SECRET\naws_session_token={}\n"
    shared.write_text(template.format("OLD"))
    asking = client({"region": REGION})
    await asking.call("ListKeys")
    shared.write_text(template.format("NEW"))
    first_faults(kms, "expired")
    await asking.call("ListKeys")
    assert kms.tokens == {"OLD", "NEW"}


async def test_configured_credentials_are_not_looked_up_anew(kms: Kms) -> None:
    """There is nothing to find, and a new client takes the processor for a good while."""
    asking = client()
    await asking.call("ListKeys")
    asking._made_at = float("-inf")
    kms.choose = lambda *_: "expired"
    with pytest.raises(AwsError, match="has expired"):
        await asking.call("ListKeys")
    assert kms.count("ListKeys") == 2


async def test_all_calls_that_a_token_expires_under_get_the_new_one(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the first one: the others would be answered 500, which nobody repeats."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    asking = client({"region": REGION})
    await asking.call("ListKeys")
    asking._made_at = float("-inf")
    together, coming = threading.Barrier(8), ["expired"] * 8

    def choose(_action: str, _key: str) -> str:
        if not coming:
            return ""
        fault = coming.pop()
        together.wait(20)
        return fault

    kms.choose = choose
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(asking.call, "ListKeys")
    assert kms.count("ListKeys") == 17


@pytest.mark.parametrize(
    ("fault", "text"),
    [("expired", "has expired: renew it"), ("skewed", "clock is wrong"), ("denied", "role needs kms:")],
)
async def test_a_refusal_is_explained_and_not_repeated_for_ever(kms: Kms, fault: str, text: str) -> None:
    kms.choose = lambda *_: fault
    with pytest.raises(AwsError, match=text) as caught:
        await client().call("ListKeys", deadline=trio.current_time() + 30)
    assert not isinstance(caught.value, AwsUnavailableError)
    assert kms.count("ListKeys") <= 2


@pytest.mark.parametrize("fault", ["throttled", "broken", "unavailable", *CUTS, *GARBLED])
async def test_what_may_be_over_is_repeated_within_the_deadline(kms: Kms, fault: str) -> None:
    first_faults(kms, fault, fault)
    assert await client().call("ListKeys", deadline=trio.current_time() + 30)
    assert kms.count("ListKeys") == 3


@pytest.mark.parametrize("fault", ["throttled", "broken", "unavailable", *CUTS, *GARBLED])
async def test_without_a_deadline_three_tries_are_made(kms: Kms, fault: str) -> None:
    kms.choose = lambda *_: fault
    with pytest.raises(AwsUnavailableError) as caught:
        await client().call("ListKeys")
    assert kms.count("ListKeys") == 3
    assert caught.value.throttled is (fault == "throttled")


async def test_the_deadline_ends_the_tries(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda _least, most: most)  # the pause that would miss it most
    asking = client()
    await asking.call("ListKeys")  # loads the library, which may take as long as the deadline below
    kms.choose = lambda *_: "throttled"
    began = trio.current_time()
    with pytest.raises(AwsUnavailableError, match="Rate exceeded"):
        await asking.call("ListKeys", deadline=began + 1.0)
    assert trio.current_time() - began < 1.2, trio.current_time() - began
    assert kms.count("ListKeys") > 3


async def test_the_pause_between_two_tries_does_not_grow_for_ever(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signer.aws.client._LONGEST_PAUSE", 0.05)
    asking = client()
    await asking.call("ListKeys")
    first_faults(kms, *["throttled"] * 9)  # 25 s, if each pause were twice the one before
    with trio.fail_after(8):
        assert await asking.call("ListKeys", deadline=trio.current_time() + 30)


async def test_credentials_are_looked_up_anew_once_for_a_call(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signer.aws.client._RENEWAL", 0.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    kms.choose = lambda *_: "expired"
    with pytest.raises(AwsError, match="has expired"):
        await client({"region": REGION}).call("ListKeys", deadline=trio.current_time() + 10)
    assert kms.count("ListKeys") == 2


async def test_the_deadline_in_a_later_try_leaves_the_better_reason(kms: Kms) -> None:
    asking = client()
    await asking.call("ListKeys")
    first_faults(kms, "throttled", "held")
    with pytest.raises(AwsUnavailableError, match="Rate exceeded"):
        await asking.call("ListKeys", deadline=trio.current_time() + 0.5)
    assert kms.count("ListKeys") == 3


async def test_a_server_that_hangs_is_left_at_the_deadline(kms: Kms) -> None:
    kms.choose = lambda *_: "held"
    began = trio.current_time()
    with pytest.raises(AwsUnavailableError, match="none within"):
        await client().call("ListKeys", deadline=began + 0.2)
    assert trio.current_time() - began < 2


async def test_a_server_that_hangs_is_left_at_the_read_timeout(kms: Kms) -> None:
    first_faults(kms, "held")
    assert await client(read_timeout=2.0).call("ListKeys")
    assert kms.count("ListKeys") == 2


async def test_a_cancelled_call_leaves_the_client_usable(kms: Kms) -> None:
    first_faults(kms, "held")
    asking = client()
    with trio.move_on_after(0.2) as scope:
        await asking.call("ListKeys")
    assert scope.cancelled_caught
    assert await asking.call("ListKeys")


async def test_calls_that_hang_take_no_place_of_others(kms: Kms) -> None:
    """Timeouts count from one byte to the next: a reply that drips outlasts them all."""
    asking = client(workers=2, read_timeout=20)
    await asking.call("ListKeys")
    first_faults(kms, "held", "held")
    for number in (2, 3):
        with pytest.raises(AwsUnavailableError):
            await asking.call("ListKeys", deadline=trio.current_time() + 1.5)
        assert kms.count("ListKeys") == number, "the call was to hang there"
    with trio.fail_after(5):
        assert await asking.call("ListKeys")
    assert kms.count("ListKeys") == 4


async def test_nobody_listening_is_told_as_such(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(AwsUnavailableError, match="whether this host resolves and reaches that name"):
        await client().call("ListKeys")


async def test_calls_at_once_are_bounded(kms: Kms) -> None:
    kms.choose = lambda *_: "held"
    asking = client(workers=3)
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(asking.call, "ListKeys")
        await wait_all_tasks_blocked()
        waiting = asking._limiter.statistics()
        assert (waiting.borrowed_tokens, waiting.tasks_waiting) == (3, 5)
        kms.hold.set()
    assert len(kms.calls) == 8
