"""Our side of a comparison: hetero_attn on its CPU lane alone, in a process of its own. Requests are those of peers.py.

    python examples/benchmarks/sides/ours.py hetero-attn --model DIRECTORY --dtype bf16|q8|q4 --threads N ...

Drives the engine's two functions, `prefill` and `decode_step`, without scheduler or tokenizer: what llama-bench does to
its own library. Three requests more, for the physics of a step and for what routers choose:

    {"test": "sweep",   "megabytes": 512}    bytes a second of reading memory and doing nothing with it: the ceiling
    {"test": "physics"}                      seconds of a decode step, of its reading ops alone, of sweeps: `_physics`
    {"test": "routes",  "tokens": 512}       how warm the experts are over a prompt of as many tokens: `_routes`
"""

import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from peers import Settings, Side, main, random_tokens

if TYPE_CHECKING:
    import torch

REPETITIONS = 15
# As bfloat16, float32 or a float16 scale this byte gives a finite number of ordinary size; timing asks for no more.
WEIGHT_BYTE = 0x3C


class HeteroAttn(Side):
    """A loaded LLM, one of whose sequences grows and is cut back."""

    def __init__(self, settings: Settings) -> None:
        from cpu_kernels import kernels
        from hetero_attn import LLM

        if settings.isa:  # users have no option for it: the best path is the right one
            chosen = kernels.choose(settings.isa)
            kernels.choose = lambda name: chosen
        self._llm = LLM(
            settings.model,
            dtype=settings.dtype,
            device="cpu",
            max_context=settings.context,
            max_batch=settings.rows + 1,
            num_threads=settings.threads,
            progress=False,
        )
        self._engine = self._llm.engine
        self._settings = settings
        self.vocab_size = self._engine.config.vocab_size
        self._sequence = self._engine.kv_cache.open()

    @property
    def length(self) -> int:
        """Tokens in the sequence."""
        return self._sequence.length

    def append(self, token_ids: list[int]) -> None:
        """See Side."""
        chunk = self._engine.prefill_chunk
        for start in range(0, len(token_ids), chunk):
            piece = token_ids[start : start + chunk]
            self._last = self._engine.prefill(self._sequence, piece, logits=start + chunk >= len(token_ids))

    def fill(self, tokens: int) -> None:
        """See Side; keys and values are random, nothing is computed."""
        from hetero_attn.engine.timed_steps import fill

        fill(self._engine, self._sequence, tokens)

    def decode(self, tokens: int) -> None:
        """See Side."""
        from hetero_attn.engine.greatest import LogitsRows, greatest_with_value

        rows = LogitsRows()
        for token_id in random_tokens(tokens, self.vocab_size):
            logits = self._engine.decode_step([self._sequence], [token_id], copy=False)
            greatest_with_value(rows.of(logits)[0])

    def rewind(self, length: int) -> None:
        """See Side; a state of fixed size cannot go back but to its start."""
        cache = self._engine.kv_cache
        if not cache.rewind(self._sequence, length):
            assert length == 0, "a model with states of fixed size is measured from an empty cache only"
            cache.close(self._sequence)
            self._sequence = cache.open()

    def batch(self, rows: int, steps: int) -> None:
        """See Side; the rows are sequences."""
        sequences = [self._engine.kv_cache.open() for _ in range(rows)]
        token_ids = list(range(rows))
        for _ in range(steps):
            token_ids = self._engine.decode_step(sequences, token_ids, copy=False).argmax(1).tolist()
        for sequence in sequences:
            self._engine.kv_cache.close(sequence)

    def logits(self, token_ids: list[int]) -> list[float]:
        """See Side."""
        self.seek(0)
        self.append(token_ids)
        return self._last.tolist()

    def about(self) -> dict[str, object]:
        """See Side; also the instruction set in use and the bytes that a decode step reads."""
        import numba
        import torch

        from cpu_kernels import CpuKernels

        workload = self._llm.plan.workload
        with CpuKernels(1) as ops:
            isa = ops.isa
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
        }
        return {
            "versions": versions,
            "isa": isa,
            "weight_bytes": workload.weight_bytes,
            "kv_bytes_per_token": sum(shard.kv_heads * shard.bytes_per_token for shard in workload.kv),
        }

    def answer(self, request: dict[str, object]) -> dict[str, object]:
        """See Side; knows `sweep` and `physics` besides. As in `LLM`, torch's threads rest: choosing a token is one of
        its parallel operations, and its threads would then spin on the cores of the next step."""
        with self._engine.lanes.torch_at_rest():
            return self._answer(request)

    def _answer(self, request: dict[str, object]) -> dict[str, object]:
        if request["test"] == "sweep":
            return {"bytes_per_s": self._sweep(request["megabytes"] << 20)}
        if request["test"] == "physics":
            return self._physics()
        if request["test"] == "routes":
            return self._routes(request["tokens"])
        return super().answer(request)

    @property
    def _clock(self) -> Callable[[], float]:
        """One thread is timed by its CPU time, which programs beside it do not lengthen."""
        return time.process_time if self._settings.threads == 1 else time.perf_counter

    def _sweep(self, total_bytes: int) -> float:
        from cpu_kernels import CpuKernels

        buffer = _filled(total_bytes, 4096)
        with CpuKernels(self._settings.threads) as ops:
            return buffer.nbytes / _median_seconds(lambda: ops.sweep(buffer), self._clock)

    def _physics(self) -> dict[str, float]:
        """Seconds of a decode step at the present depth, and of its parts, turn by turn; medians.

        step_s: all of it, Python included. reading_s: its ops that read weights or cache, alone. linears_s: those that
        read weights. sweep_s: a read-only sweep over as many of the same weights, of experts over others in each turn.
        Nothing of a model whose steps are not recorded.
        """
        engine = self._engine
        if any(not block.records for block in engine.weights.spec.blocks):
            return {}
        if engine.plan.workload.states:  # which go back to an empty sequence alone
            self.rewind(0)
        length = self.length

        def step() -> None:
            self.decode(1)
            self.rewind(length)

        step()
        program = engine.forward.replay.program(1)
        reading, weights = ("linear", "expert_linear"), self._weights_of_a_row
        parts = {
            "step_s": step,
            "reading_s": program.select(lambda name: name.startswith((*reading, "decode"))).run,
            "linears_s": program.select(lambda name: name.startswith(reading)).run,
            "sweep_s": lambda: [engine.lanes.host_ops.sweep(weight) for weight in weights()],
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(REPETITIONS):
            for name, work in parts.items():
                times[name].append(_seconds(work, self._clock))
        return {name: statistics.median(values) for name, values in times.items()}

    def _weights_of_a_row(self) -> "list[torch.Tensor]":
        """Memory of the weights that one row reads; random experts, as many as a router chooses."""
        found = []
        for linear in self._engine.weights.linears:
            spec = linear.spec
            is_whole = spec.kind != "experts"
            found += [linear.dram] if is_whole else random.sample(list(linear.dram), spec.per_row)
        return found

    def _routes(self, tokens: int) -> dict[str, object]:
        """Over the prompt of as many tokens, means over the layers: how many experts it chooses, the share of picks
        that the next token makes again, how many other experts lie between two choices of one (median), and what
        slots for a quarter and for half of the experts would hold. Nothing of a model without experts."""
        from hetero_attn.tools.routes.heat import run

        if not any(linear.spec.kind == "experts" for linear in self._engine.weights.linears):
            return {}
        layers = run(self._llm, random_tokens(tokens, self.vocab_size)).layers
        experts = layers[0].experts
        figures = {
            "distinct": [layer.distinct for layer in layers],
            "next_token": [layer.next_token for layer in layers],
            "reuse_distance": [sum(hits < 0.5 * layer.hits[-1] for hits in layer.hits) - 1 for layer in layers],
            "quarter_held": [layer.hits[experts // 4] for layer in layers],
            "half_held": [layer.hits[experts // 2] for layer in layers],
        }
        return {name: statistics.mean(values) for name, values in figures.items()} | {
            "tokens": tokens,
            "experts": experts,
            "per_row": layers[0].per_row,
        }


def _filled(total_bytes: int, row_bytes: int) -> "torch.Tensor":
    """A uint8 [rows, row_bytes] of about `total_bytes`, in huge pages where the system gives them."""
    import torch

    from cpu_kernels import advise_huge_pages

    tensor = torch.empty((max(1, total_bytes // row_bytes), row_bytes), dtype=torch.uint8)
    advise_huge_pages(tensor)
    return tensor.fill_(WEIGHT_BYTE)


def _median_seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Median time of one call, warmed up."""
    work()
    return statistics.median(_seconds(work, clock) for _ in range(REPETITIONS))


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


if __name__ == "__main__":
    main({"hetero-attn": HeteroAttn})
