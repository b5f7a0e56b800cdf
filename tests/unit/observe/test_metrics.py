"""Metrics: the reference's names and buckets, and no label value that a client can choose freely."""

from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from signer import __version__
from signer.observe.metrics import Metrics
from signer.observe.tasks import Tasks

TZ1 = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
CHAIN = "NetXdQprcVkpaWU"
Samples = dict[tuple[str, ...], float]


def samples(metrics: Metrics, name: str, *labels: str) -> Samples:
    """The values of one sample name in the exposition, summed by the values of *labels*."""
    found: Counter[tuple[str, ...]] = Counter()
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            if sample.name == name:
                found[tuple(sample.labels[label] for label in labels)] += sample.value  # type: ignore[assignment]
    return dict(found)


def exercised() -> Metrics:
    """Metrics of which each has counted something."""
    metrics = Metrics()
    metrics.know_addresses([TZ1])
    metrics.handled(TZ1, "OK", 0.05)
    metrics.signed(TZ1, "NitroEnclave", "attestation", (), CHAIN, 0)
    metrics.vault_signed("NitroEnclave", TZ1, "attestation", CHAIN, 0.002)
    metrics.vault_error("NitroEnclave", "502", CHAIN)
    metrics.policy_violation("block", TZ1)
    metrics.watermark_refused(TZ1, "block", CHAIN, "level_below", "NitroEnclave")
    metrics.watermark_operation("file", "block", refused=True)
    metrics.watermark_duration("file", 0.003)
    metrics.watermark_io("write", 0.0015, "disk full")
    metrics.vault_state("nitro", up=True, keys=3)
    return metrics


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("sign_handler_requests_total", "address status"),
        ("sign_handler_request_duration_milliseconds_count", "address status"),
        ("signing_ops_total", "address vault op kind chain_id"),
        ("vault_sign_request_duration_milliseconds_count", "vault address op chain_id"),
        ("vault_sign_request_error_total", "vault code chain_id"),
        ("consensus_round_total", "address operation_type chain_id round"),
        ("policy_violation_total", "violation_type address operation_type"),
        ("watermark_rejection_total", "address operation_type chain_id reason"),
        ("watermark_operations_total", "result backend request_type"),
        ("watermark_operation_duration_seconds_count", "backend"),
        ("watermark_io_operations_total", "backend operation table_name result"),
        ("watermark_io_latency_seconds_count", "backend operation table_name"),
        ("watermark_io_errors_total", "backend error_type table_name operation"),
        ("signatory_build_info", "path version checksum revision branch"),
        ("vault_up", "vault"),
        ("vault_keys", "vault"),
    ],
)
def test_each_metric_has_the_labels_of_the_reference(name: str, labels: str) -> None:
    found = [
        set(sample.labels)
        for family in text_string_to_metric_families(exercised().exposition().decode())
        for sample in family.samples
        if sample.name == name
    ]
    assert found
    assert all(names == set(labels.split()) for names in found)


def test_what_is_not_known_of_the_build_says_so() -> None:
    (sample,) = (
        sample
        for family in text_string_to_metric_families(Metrics().exposition().decode())
        for sample in family.samples
        if sample.name == "signatory_build_info"
    )
    assert [sample.labels[name] for name in ("checksum", "revision", "branch")] == ["(unknown)"] * 3
    assert sample.labels["version"] == __version__


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("sign_handler_request_duration_milliseconds", [10, 100, 1000, 10000, 100000]),
        ("vault_sign_request_duration_milliseconds", [10, 100, 1000, 10000, 100000]),
        ("watermark_operation_duration_seconds", [0.001 * 2**k for k in range(10)]),
        ("watermark_io_latency_seconds", [0.0001 * 2**k for k in range(14)]),
    ],
)
def test_buckets_are_those_of_the_reference(name: str, bounds: list[float]) -> None:
    buckets = samples(exercised(), f"{name}_bucket", "le")
    assert [float(bound) for (bound,) in buckets] == [*map(pytest.approx, bounds), float("inf")]


def test_times_are_converted_to_the_unit_in_the_name() -> None:
    metrics = exercised()
    assert samples(metrics, "sign_handler_request_duration_milliseconds_sum") == {(): pytest.approx(50)}
    assert samples(metrics, "vault_sign_request_duration_milliseconds_sum") == {(): pytest.approx(2)}
    assert samples(metrics, "watermark_operation_duration_seconds_sum") == {(): pytest.approx(0.003)}
    assert samples(metrics, "watermark_io_latency_seconds_sum") == {(): pytest.approx(0.0015)}


def test_a_batch_counts_each_operation_and_has_no_round() -> None:
    metrics = Metrics()
    metrics.signed(TZ1, "NitroEnclave", "generic", ("transaction", "transaction", "reveal"), "", None)
    metrics.signed(TZ1, "NitroEnclave", "block", (), CHAIN, 1)
    assert samples(metrics, "signing_ops_total", "op", "kind", "chain_id") == {
        ("generic", "transaction", ""): 2,
        ("generic", "reveal", ""): 1,
        ("block", "block", CHAIN): 1,
    }
    assert samples(metrics, "consensus_round_total", "operation_type", "round") == {("block", "1"): 1}


def test_a_watermark_refusal_is_an_error_of_the_vault_too() -> None:
    metrics = Metrics()
    metrics.know_addresses([TZ1])
    metrics.watermark_refused(TZ1, "block", CHAIN, "conflict", "NitroEnclave")
    assert samples(metrics, "watermark_rejection_total", "address", "reason") == {(TZ1, "conflict"): 1}
    assert samples(metrics, "vault_sign_request_error_total", "vault", "code", "chain_id") == {
        ("NitroEnclave", "409", CHAIN): 1
    }


def test_outcomes_of_watermark_checks_and_accesses() -> None:
    metrics = Metrics()
    metrics.watermark_operation("mem", "generic", refused=False)
    metrics.watermark_operation("mem", "block", refused=True)
    metrics.watermark_io("write", 0.1, None)
    metrics.watermark_io("write", 0.1, "busy")
    assert samples(metrics, "watermark_operations_total", "result", "request_type") == {
        ("success", "generic"): 1,
        ("rejected", "block"): 1,
    }
    assert samples(metrics, "watermark_io_operations_total", "result") == {("success",): 1, ("error",): 1}
    assert samples(metrics, "watermark_io_errors_total", "error_type") == {("busy",): 1}


def test_addresses_that_are_not_configured_share_one_label() -> None:
    metrics = Metrics()
    metrics.know_addresses([TZ1])
    for number in range(500):
        address = f"tz1{number}"
        metrics.handled(address, "Not Found", 0.0)
        metrics.policy_violation("block", address)
    metrics.handled(TZ1, "OK", 0.0)
    assert samples(metrics, "sign_handler_requests_total", "address") == {("unknown",): 500, (TZ1,): 1}
    assert samples(metrics, "policy_violation_total", "address") == {("unknown",): 500}


def test_rounds_above_63_share_one_label() -> None:
    metrics = Metrics()
    for number in range(200):
        metrics.signed(TZ1, "NitroEnclave", "attestation", (), CHAIN, number)
    rounds = samples(metrics, "consensus_round_total", "round")
    assert set(rounds) == {(str(number),) for number in range(64)} | {("other",)}
    assert rounds["other",] == 136


def test_chains_beyond_64_share_one_label_everywhere() -> None:
    metrics = Metrics()
    for number in range(300):
        chain = f"Net{number}"
        metrics.vault_error("NitroEnclave", "500", chain)
        metrics.signed(TZ1, "NitroEnclave", "block", (), chain, 0)
        metrics.vault_signed("NitroEnclave", TZ1, "block", chain, 0.0)
        metrics.watermark_refused(TZ1, "block", chain, "conflict", "NitroEnclave")
    expected = {(f"Net{number}",) for number in range(64)} | {("other",)}
    for name in (
        "signing_ops_total",
        "consensus_round_total",
        "vault_sign_request_error_total",
        "vault_sign_request_duration_milliseconds_count",
        "watermark_rejection_total",
    ):
        chains = samples(metrics, name, "chain_id")
        assert set(chains) == expected
        assert chains["other",] == 236 * (2 if name == "vault_sign_request_error_total" else 1)
    metrics.signed(TZ1, "NitroEnclave", "block", (), "Net5", 0)
    assert samples(metrics, "signing_ops_total", "chain_id")["Net5",] == 2, "a chain once seen keeps its label"


def test_two_signers_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.handled(TZ1, "OK", 0.0)
    assert samples(one, "sign_handler_requests_total", "status") == {("OK",): 1}
    assert samples(other, "sign_handler_requests_total", "status") == {}


def test_tasks_are_shown_as_they_are_and_vanish_with_the_board() -> None:
    metrics, tasks = Metrics(), Tasks()
    metrics.follow(tasks)
    good, bad = tasks.add("good"), tasks.add("bad", quiet=True)
    for task in (good, bad):
        task.running()
    bad.failing("gone")
    assert samples(metrics, "task_up", "task") == {("good",): 1, ("bad",): 0}
    assert samples(metrics, "task_restarts_total", "task") == {("good",): 0, ("bad",): 1}
    faults = samples(metrics, "task_last_fault_timestamp_seconds", "task")
    assert faults == {("good",): 0, ("bad",): bad.fault_at}
    since = samples(metrics, "task_state_since_timestamp_seconds", "task")
    assert since == {("good",): good.since, ("bad",): bad.since}
    tasks.remove("bad")
    assert samples(metrics, "task_up", "task") == {("good",): 1}


def test_an_access_to_a_table_that_is_refused_is_no_failed_one() -> None:
    metrics = Metrics()
    metrics.watermark_table_io("marks", "write", 0.01, None, refused=False)
    metrics.watermark_table_io("marks", "write", 0.01, None, refused=True)
    metrics.watermark_table_io("marks", "create", 0.01, "AccessDeniedException", refused=False)
    labels = ("backend", "operation", "table_name")
    assert samples(metrics, "watermark_io_operations_total", *labels, "result") == {
        ("aws", "write", "marks", "success"): 1,
        ("aws", "write", "marks", "error"): 1,
        ("aws", "create", "marks", "error"): 1,
    }
    assert samples(metrics, "watermark_io_errors_total", *labels, "error_type") == {
        ("aws", "create", "marks", "AccessDeniedException"): 1
    }
    assert samples(metrics, "watermark_io_latency_seconds_count", *labels)["aws", "write", "marks"] == 2


def test_what_an_enclave_counts_is_what_it_counts_now() -> None:
    """After its restart a name that it has not counted yet would stay at the number of before."""
    metrics = Metrics()
    metrics.enclave_counted("n", {("calls", "Sign"): 5, ("uptime", ""): 9.5})
    metrics.enclave_counted("o", {("calls", "Sign"): 7})
    metrics.enclave_counted("n", {("calls", "Sign"): 1})
    told = [line for line in metrics.exposition().decode().splitlines() if line.startswith("enclave_counter{")]
    assert sorted(told) == [
        'enclave_counter{counter="calls",name="Sign",vault="n"} 1.0',
        'enclave_counter{counter="calls",name="Sign",vault="o"} 7.0',
    ]
    metrics.enclave_counted("n", {})
    assert 'vault="n"' not in metrics.exposition().decode()
    metrics.enclave_lines_dropped("n", 3)
    metrics.enclave_lines_dropped("n", 2)
    assert 'enclave_log_dropped_total{vault="n"} 5.0' in metrics.exposition().decode()
