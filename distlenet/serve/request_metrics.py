"""What ``GET /metrics`` answers: counters and histograms in the text format of Prometheus."""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from distlenet.serve.batching import Batcher
from distlenet.serve.messages import Response
from distlenet.serve.versions import Versions

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SAMPLES = tuple(2**i for i in range(11))


class RequestMetrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        requests = Counter("distlenet_requests", "Requests", ["endpoint", "status"], registry=self.registry)
        seconds = Histogram(
            "distlenet_request_seconds", "Seconds per request", ["endpoint"], buckets=SECONDS, registry=self.registry
        )
        self._requests = cache(lambda endpoint, status: requests.labels(endpoint, status).inc)
        self._seconds = cache(lambda endpoint: seconds.labels(endpoint).observe)
        batches = Histogram("distlenet_batch_samples", "Samples per batch", buckets=SAMPLES, registry=self.registry)
        self.observe_batch = batches.observe

    def observe(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request. The endpoints and statuses are few, so the labels are bounded."""
        self._requests(endpoint, status)()
        self._seconds(endpoint)(seconds)

    def watch(self, batcher: Batcher, versions: Versions) -> None:
        """Report the queue and the versions, too."""
        gauges = {
            "distlenet_queued_samples": ("Samples that wait for a batch", lambda: batcher.queued),
            "distlenet_model_version": ("Newest version that is served", lambda: max(versions.loaded, default=0)),
            "distlenet_load_failures": ("Versions that could not be loaded", lambda: versions.failure_count),
        }
        for name, (text, function) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(function)

    def response(self) -> Response:
        """Return the answer to ``GET /metrics``."""
        return Response(generate_latest(self.registry), 200, CONTENT_TYPE)
