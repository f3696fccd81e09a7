"""What a server tells Prometheus: answers as clients saw them, and the engine's own counts at the moment of asking."""

from __future__ import annotations

from collections.abc import Iterator

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise ImportError('serving needs the package prometheus-client: pip install "dsv3-jax[serve]"') from missing

from dsv3_jax.inference.server.answer import Answer, Choice, Serves

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (.001, .0025, .005, .01, .02, .03, .05, .075, .1, .15, .25, .5, 1, 2.5)


class Metrics:
    """Counts of one server. Used on its event loop."""

    def __init__(self, engine: Serves):
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(name, about, labels, registry=self._registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, about, buckets=buckets, registry=self._registry)
        self._requests = counter("dsv3_requests", "Requests for text: ok, invalid (4xx), busy (429), disconnected "
                                 "(the client was gone), failed (5xx)", "endpoint", "outcome")
        self._choices = counter("dsv3_choices", "Answers, one or more a request: stop, length, cancelled, error",
                                "finish")
        self._prompt = counter("dsv3_prompt_tokens", "Tokens of prompts, as in usage")
        self._reused = counter("dsv3_reused_prompt_tokens", "Of these the ones found in pages of earlier requests")
        self._new = counter("dsv3_completion_tokens", "Tokens of answers, as in usage")
        self._first = histogram("dsv3_time_to_first_token_seconds", "From a request's arrival, for each answer",
                                _SECONDS)
        self._each = histogram("dsv3_time_per_output_token_seconds", "Mean over an answer's tokens after its first",
                               _TOKEN_SECONDS)
        self._whole = histogram("dsv3_end_to_end_seconds", "From a request's arrival to the end of each answer",
                                _SECONDS)

    def text(self) -> bytes:
        """All of them, of CONTENT_TYPE."""
        return generate_latest(self._registry)

    def ended(self, endpoint: str, outcome: str) -> None:
        """A request has."""
        self._requests.labels(endpoint, outcome).inc()

    def answered(self, answer: Answer, arrived_s: float) -> None:
        """An answer has ended, or will not be read any more.

        Args:
          arrived_s: when the request came, of `time.perf_counter`.
        """
        usage = answer.usage
        self._prompt.inc(usage.prompt)
        self._reused.inc(usage.reused)
        self._new.inc(usage.new)
        for choice in answer.choices:
            self._choices.labels(str(choice.finish or "cancelled")).inc()
            self._times(choice, arrived_s)

    def _times(self, choice: Choice, arrived_s: float) -> None:
        first_s = choice.ticket.first_token_s
        if first_s is not None:
            self._first.observe(first_s - arrived_s)
        if first_s is not None and choice.finish is not None:
            self._whole.observe(choice.ended_s - arrived_s)
            if choice.tokens > 1:
                self._each.observe((choice.ended_s - first_s) / (choice.tokens - 1))


class _OfEngine(Collector):
    """The engine's own counts; asked for, not kept."""

    def __init__(self, engine: Serves):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, totals = self._engine, self._engine.totals
        for name, about, gauge in [("running", "Answers being made", engine.running),
                                   ("waiting", "Answers waiting for a row", engine.waiting),
                                   ("free_pages", "Pages of the cache that no answer holds", engine.free_pages),
                                   ("up", "1 while the engine works", int(engine.error is None))]:
            yield GaugeMetricFamily(f"dsv3_engine_{name}", about, gauge)
        for name, about, count in [
                ("read_tokens", "Tokens of prompts that were computed", totals.read_tokens),
                ("new_tokens", "Tokens made, also beyond stop sequences", totals.new_tokens),
                ("chunks", "Times that parts of prompts were read", totals.chunks),
                ("steps", "Decoding steps", totals.steps),
                ("row_steps", "Answers that took part in these, summed", totals.row_steps),
                ("preemptions", "Times that an answer gave its pages up", totals.preemptions),
                ("rebalances", "Times that experts' replicas were placed anew", totals.rebalances),
                ("moved_bytes", "Of experts' weights that came to other devices by that", totals.moved_bytes),
                ("refused", "Answers that found the line full", totals.refused)]:
            yield CounterMetricFamily(f"dsv3_engine_{name}", about, count)
        accepted = CounterMetricFamily("dsv3_engine_drafts_accepted", "Drafts kept, by how many tokens ahead they "
                                       "were; of dsv3_engine_row_steps tries", labels=["position"])
        for position, kept in enumerate(totals.accepted, 1):
            accepted.add_metric([str(position)], kept)
        yield accepted
