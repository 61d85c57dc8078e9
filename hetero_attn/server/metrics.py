"""Counters of a server for Prometheus: vLLM's names for what means the same there, `hetero_` for what only we have.

Counted on the event loop, in step with what clients are shown; gauges are read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:  # it needs torch, whose import would keep a server from answering while it loads
    from hetero_attn.serving.request import Request

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
Gauges = Callable[[], dict[str, float]]
Phases = Callable[[], dict[str, dict[str, float]]]
Labelled = tuple[str, dict[str, int]]  # a label, and counts by its values
Counts = Callable[[], dict[str, int | Labelled]]


class ServerMetrics:
    """The counters of one server. gauges, phases, counts: what is read at the time of asking, by name and by phase."""

    def __init__(self, gauges: Gauges, phases: Phases, counts: Counts = dict) -> None:
        self._registry = CollectorRegistry()
        self._shown_tokens: dict[Request, int] = {}
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts that were computed or found.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens that were generated.")
        self._queries = self._counter("vllm:prefix_cache_queries", "Tokens of prompts looked for in the prefix cache.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Tokens of prompts found there.")
        self._ended = self._counter("vllm:request_success", "Requests that ended, by reason.", "finished_reason")
        self._aborted = self._counter("hetero_requests_aborted", "Requests that did not end by themselves.", "cause")
        self._refused = self._counter("hetero_requests_refused", "Answers that are errors, by status.", "status")
        self._unknown = self._counter("hetero_unknown_fields", "Fields of bodies that were ignored.")
        self._first = self._histogram("vllm:time_to_first_token_seconds", "From the call to the first token.", SECONDS)
        self._each = self._histogram("vllm:request_time_per_output_token_seconds", "Per later token.", TOKEN_SECONDS)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From the call to the end.", SECONDS)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Computing the prompt.", SECONDS)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "Computing the answer.", SECONDS)
        self._registry.register(_WhenAsked(gauges, phases, counts))

    def moved(self, request: Request, now: int) -> None:
        """Count the tokens that a request, which has `now` of them, made since it was last looked at."""
        shown = self._shown_tokens.get(request, 0)
        self._generated.inc(now - shown)
        self._shown_tokens[request] = now
        if shown == 0 and now:
            tokens = len(request.prompt_token_ids)
            self._prompt.inc(tokens)
            self._queries.inc(tokens)
            self._hits.inc(request.reused)

    def ended(self, request: Request) -> None:
        """Count a request that has ended."""
        self._shown_tokens.pop(request, None)
        if request.finish_reason == "abort":
            self._aborted.labels("error" if request.error else "client").inc()
            return
        self._ended.labels(request.finish_reason).inc()
        if request.scores is not None:  # which no token follows that would tell of it
            self._prompt.inc(len(request.prompt_token_ids))
        metrics = request.metrics
        if not metrics.generated_tokens:
            return
        self._first.observe(metrics.time_to_first_token_s)
        self._prefill.observe(metrics.prefill_s)
        self._decode.observe(metrics.decode_s)
        self._whole.observe(metrics.time_to_first_token_s + metrics.decode_s)
        if metrics.generated_tokens > 1:
            self._each.observe(metrics.decode_s / (metrics.generated_tokens - 1))

    def lost(self, request: Request) -> None:
        """Count a request that a dead engine took with it."""
        self._shown_tokens.pop(request, None)
        self._aborted.labels("engine").inc()

    def refused(self, status: int) -> None:
        """Count an answer that is an error."""
        self._refused.labels(str(status)).inc()

    def ignored(self, fields: int) -> None:
        """Count fields that no protocol of ours knows."""
        self._unknown.inc(fields)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self._registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, buckets=buckets, registry=self._registry)


class _WhenAsked(Collector):
    """Gauges, and the engine's own totals by phase."""

    def __init__(self, gauges: Gauges, phases: Phases, counts: Counts) -> None:
        self._gauges, self._phases, self._counts = gauges, phases, counts

    def collect(self) -> Iterator[Metric]:
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(name, name.partition(":")[2] or name, value=value)
        for name, counted in self._counts().items():
            meaning = name.partition(":")[2] or name
            if isinstance(counted, int):
                yield CounterMetricFamily(name, meaning, value=counted)
                continue
            label, by_value = counted
            family = CounterMetricFamily(name, f"{meaning}, by {label}", labels=[label])
            for each, count in by_value.items():
                family.add_metric([each], count)
            yield family
        totals: dict[str, CounterMetricFamily] = {}
        for phase, counts in self._phases().items():
            for name, value in counts.items():
                unit = f"{name[:-2]}_seconds" if name.endswith("_s") else name
                family = totals.setdefault(
                    name, CounterMetricFamily(f"hetero_{unit}", f"{unit} of all steps, by phase", labels=["phase"])
                )
                family.add_metric([phase], value)
        yield from totals.values()
