"""Prometheus metrics with the names, labels and buckets of the reference; section 8 of the signer specification.

Label values are bounded: what a client can choose freely (an address of no key of ours, a round, an error text) is
folded into `unknown` or `other`, so that nobody fills the memory of signer and Prometheus (weakness 42).
"""

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from signer import __version__
from signer.observe.tasks import Tasks, TaskState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MILLISECONDS = (10, 100, 1000, 10000, 100000)
_OPERATION_SECONDS = tuple(0.001 * 2**k for k in range(10))
_IO_SECONDS = tuple(0.0001 * 2**k for k in range(14))
_MAX_ROUND = 63  # a higher round is counted as `other`
_MAX_CHAINS = 64  # distinct chain ids; a key without allowed_chains signs for any
OTHER = "other"


class Metrics:
    """All metrics of one signer, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._chains: set[str] = set()
        self._addresses: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self._handler = counter("sign_handler_requests", "Signing requests answered", "address", "status")
        self._handler_time = histogram(
            "sign_handler_request_duration_milliseconds", "Time to answer", _MILLISECONDS, "address", "status"
        )
        self._signed = counter("signing_ops", "Operations signed", "address", "vault", "op", "kind", "chain_id")
        self._vault_time = histogram(
            "vault_sign_request_duration_milliseconds",
            "Time of the vault to sign",
            _MILLISECONDS,
            "vault",
            "address",
            "op",
            "chain_id",
        )
        self._vault_errors = counter("vault_sign_request_error", "Failed signings", "vault", "code", "chain_id")
        self._rounds = counter(
            "consensus_round", "Consensus requests signed by round", "address", "operation_type", "chain_id", "round"
        )
        self._violations = counter(
            "policy_violation", "Requests refused by policy", "violation_type", "address", "operation_type"
        )
        self._refusals = counter(
            "watermark_rejection",
            "Requests refused by watermark",
            "address",
            "operation_type",
            "chain_id",
            "reason",
        )
        self._authentication = counter(
            "authentication_failure", "Failed authentications", "status", "auth_method", "client_ip"
        )
        self._mark_operations = counter("watermark_operations", "Watermark checks", "result", "backend", "request_type")
        self._mark_time = histogram(
            "watermark_operation_duration_seconds", "Time of a watermark check", _OPERATION_SECONDS, "backend"
        )
        self._io = counter(
            "watermark_io_operations", "Accesses to the store", "backend", "operation", "table_name", "result"
        )
        self._io_time = histogram(
            "watermark_io_latency_seconds", "Time of an access", _IO_SECONDS, "backend", "operation", "table_name"
        )
        self._io_errors = counter(
            "watermark_io_errors", "Failed accesses", "backend", "error_type", "table_name", "operation"
        )
        self._judged = counter("enclave_attestations", "Judgements of an enclave before its use", "vault", "outcome")
        self._enclave = Gauge(
            "enclave_counter", "What the enclave's program counts", ["vault", "counter", "name"], registry=registry
        )
        self._dropped = counter("enclave_log_dropped", "Lines of the enclave's log that nobody was told", "vault")
        self._counted: dict[str, list[tuple[str, str]]] = {}  # by vault: what of it is shown
        self._vault_up = Gauge("vault_up", "Whether the vault can be asked now", ["vault"], registry=registry)
        self._vault_keys = Gauge("vault_keys", "Keys usable now", ["vault"], registry=registry)
        Gauge(
            "signatory_build_info",
            "Build of this program",
            ["path", "version", "checksum", "revision", "branch"],
            registry=registry,
        ).labels("nitro-signer", __version__, "(unknown)", "(unknown)", "(unknown)").set(1)

    def exposition(self) -> bytes:
        """The text that `/metrics` answers."""
        return generate_latest(self.registry)

    def follow(self, tasks: Tasks) -> None:
        """Show every one of *tasks*, as it is at each exposition."""
        self.registry.register(_TaskCollector(tasks))

    def know_addresses(self, addresses: Sequence[str]) -> None:
        """Addresses that may stand in a label; every other is `unknown`."""
        self._addresses.update(addresses)

    def handled(self, address: str, status: str, seconds: float) -> None:
        """One answered `POST /keys/…`; *status* is the text of the HTTP status."""
        address = self._address(address)
        self._handler.labels(address, status).inc()
        self._handler_time.labels(address, status).observe(seconds * 1000)

    def signed(
        self, address: str, vault: str, kind: str, operations: Sequence[str], chain_id: str, round: int | None
    ) -> None:
        """One request signed; a batch counts once for each of its operations."""
        chain_id = self._chain(chain_id)
        for operation in operations or (kind,):
            self._signed.labels(address, vault, kind, operation, chain_id).inc()
        if round is not None:
            self._rounds.labels(address, kind, chain_id, str(round) if round <= _MAX_ROUND else OTHER).inc()

    def vault_signed(self, vault: str, address: str, kind: str, chain_id: str, seconds: float) -> None:
        """The vault made one signature."""
        self._vault_time.labels(vault, address, kind, self._chain(chain_id)).observe(seconds * 1000)

    def vault_error(self, vault: str, code: str, chain_id: str) -> None:
        """A signing failed after the checks; *code* is the HTTP status, or `n/a`."""
        self._vault_errors.labels(vault, code, self._chain(chain_id)).inc()

    def policy_violation(self, violation: str, address: str) -> None:
        """A request was refused; *violation* is `form`, or the refused kind."""
        self._violations.labels(violation, self._address(address), "request").inc()

    def watermark_refused(self, address: str, kind: str, chain_id: str, reason: str, vault: str) -> None:
        """The watermark refused a request; *reason* is one of the bounded ones."""
        self._refusals.labels(self._address(address), kind, self._chain(chain_id), reason).inc()
        self.vault_error(vault, "409", chain_id)

    def watermark_operation(self, backend: str, kind: str, *, refused: bool) -> None:
        """One check, also for requests that have no watermark."""
        self._mark_operations.labels("rejected" if refused else "success", backend, kind).inc()

    def watermark_duration(self, backend: str, seconds: float) -> None:
        self._mark_time.labels(backend).observe(seconds)

    def watermark_io(self, operation: str, seconds: float, error: str | None) -> None:
        """One access to the file store; thread-safe."""
        self._io.labels("file", operation, "", "success" if error is None else "error").inc()
        self._io_time.labels("file", operation, "").observe(seconds)
        if error is not None:
            self._io_errors.labels("file", error, "", operation).inc()

    def watermark_table_io(
        self, table: str, operation: str, seconds: float, error: str | None, *, refused: bool
    ) -> None:
        """One access to a DynamoDB table; a condition that refuses is an error of the access, as in the reference."""
        self._io.labels("aws", operation, table, "error" if refused or error is not None else "success").inc()
        self._io_time.labels("aws", operation, table).observe(seconds)
        if error is not None:
            self._io_errors.labels("aws", error, table, operation).inc()

    def enclave_judged(self, vault: str, outcome: str) -> None:
        """One judgement; *outcome*: `ok`, `no answer`, or the reason of the verification."""
        self._judged.labels(vault, outcome).inc()

    def enclave_counted(self, vault: str, numbers: Mapping[tuple[str, str], float]) -> None:
        """All that the enclave's program counts now; whoever follows it bounds the texts. Others are shown no more."""
        for counter, name in self._counted.get(vault, ()):
            if (counter, name) not in numbers:
                self._enclave.remove(vault, counter, name)
        for (counter, name), value in numbers.items():
            self._enclave.labels(vault, counter, name).set(value)
        self._counted[vault] = list(numbers)

    def enclave_lines_dropped(self, vault: str, lines: int) -> None:
        """*lines* of the enclave's log were missing, too many, or none."""
        self._dropped.labels(vault).inc(lines)

    def vault_state(self, vault: str, *, up: bool, keys: int) -> None:
        self._vault_up.labels(vault).set(int(up))
        self._vault_keys.labels(vault).set(keys)

    def _address(self, address: str) -> str:
        return address if address in self._addresses else "unknown"

    def _chain(self, chain_id: str) -> str:
        if chain_id == "" or chain_id in self._chains:
            return chain_id
        if len(self._chains) >= _MAX_CHAINS:
            return OTHER
        self._chains.add(chain_id)
        return chain_id


class _TaskCollector(Collector):
    """Reads the board: a task that is gone from it is gone from the exposition."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("task_up", "Whether the task does its work", labels=["task"])
        restarts = CounterMetricFamily("task_restarts", "Times that it failed while it ran", labels=["task"])
        fault = GaugeMetricFamily("task_last_fault_timestamp_seconds", "When it failed, 0: never", labels=["task"])
        since = GaugeMetricFamily("task_state_since_timestamp_seconds", "When its state changed", labels=["task"])
        for name, task in self._tasks.all().items():
            up.add_metric([name], int(task.state is TaskState.RUNNING))
            restarts.add_metric([name], task.restarts)
            fault.add_metric([name], task.fault_at or 0)
            since.add_metric([name], task.since)
        return up, restarts, fault, since
