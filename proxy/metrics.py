"""Prometheus metrics of the proxy, P2.29 of the proxy specification.

Labels name the listener and the peer's CID, never a port, and no more CIDs than `_MAX_CIDS`.
"""

import threading
from collections.abc import Sequence
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.process_collector import ProcessCollector

_MAX_CIDS = 64
_CONNECT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_DURATION_SECONDS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0)


class Metrics:
    """The metrics of one process, in *registry* or in a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        if registry is None:
            registry = CollectorRegistry()
            ProcessCollector(registry=registry)
        self.registry = registry
        self._cids: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vsock_proxy_{name}", text, ("listener", *labels), registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vsock_proxy_{name}", text, ("listener",), registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vsock_proxy_{name}_seconds", text, ("listener",), buckets=buckets, registry=registry)

        self.accepted = counter("accepted", "Connections accepted", "cid")
        self.refused = counter("refused", "Connections that were not served, by reason", "cid", "reason")
        self.ended = counter("ended", "Connections that were served, by how they ended", "cid", "reason")
        self.bytes = counter("bytes", "Bytes handed over; up: from the client to the target", "cid", "direction")
        self.active = gauge("active", "Connections that are served now")
        self.waiting = gauge("waiting", "Accepted connections that wait to be served")
        self.connect = histogram("connect", "Time to connect to the target", _CONNECT_SECONDS)
        self.first_byte = histogram("first_byte", "Time to the target's first byte", _CONNECT_SECONDS)
        self.duration = histogram("duration", "Time from the connection to the target to the end", _DURATION_SECONDS)
        self.lookup_failures = counter("lookup_failures", "Lookups of the target's name that failed")
        self.lookup_age = gauge("lookup_age_seconds", "Time since the target's name was last found; NaN: never")
        self.candidates = gauge("candidates", "Addresses of the target that are tried")

    def cid(self, cid: int | None) -> str:
        """The label of a peer; beyond `_MAX_CIDS` different ones it is `other`."""
        text = "unknown" if cid is None else str(cid)
        if text not in self._cids:
            if len(self._cids) >= _MAX_CIDS:
                return "other"
            self._cids.add(text)
        return text


class Endpoint:
    """Serves the metrics of a registry over HTTP, in a thread of its own, until `close`."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Listen on *host* and *port*; raises `OSError`."""
        server: WSGIServer
        thread: threading.Thread
        server, thread = start_http_server(port, addr=host, registry=metrics.registry)
        self._server, self._thread = server, thread
        self.port: int = server.server_address[1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
