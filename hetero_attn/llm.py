"""The public API: load a model by a plan, generate, stream, chat, score."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hetero_attn.engine.host_memory import expect_room, memory_named
from hetero_attn.engine.lane_report import LaneReport
from hetero_attn.engine.measure import refresh_profile
from hetero_attn.engine.rebalance import Rebalancer
from hetero_attn.engine.replan import Replanner
from hetero_attn.errors import ArgumentError
from hetero_attn.planning.arguments import checked_arguments
from hetero_attn.planning.draft import settle_drafted
from hetero_attn.planning.options import PAGE_TOKENS, LoadOptions
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.serving.defaults import default_params
from hetero_attn.serving.drafting import load_speculator
from hetero_attn.serving.grammar import Grammars
from hetero_attn.serving.intake import Intake, Messages, Prompt
from hetero_attn.serving.loading import load_beside, refuse_early
from hetero_attn.serving.parameters import Params, for_each
from hetero_attn.serving.progress import PrefillBar
from hetero_attn.serving.prompts import are_conversations, as_prompts
from hetero_attn.serving.request import Request, RequestOutput
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.serving.scheduling.scheduler import Scheduler
from hetero_attn.serving.scheduling.turns import Turns
from hetero_attn.serving.stream import Stream
from hetero_attn.serving.text.tokenizer import Tokenizer
from placement import HardwareProfile, Plan, Policy
from placement.plan.units import parse_bytes


class LLM:
    """A language model whose layers are split over GPU memory, PCIe and CPU cores by a plan.

    model: local directory, GGUF file or hub id. file: which GGUF file of a directory or repository, such as "*Q4_K_M*"
    or "Q4_K_M"; with one dtype "auto" keeps every tensor as the file has it. tokenizer: a folder, file or hub id whose
    tokenizer goes before the model's own. policy: a shipped policy's name, a YAML file or a Policy. gpu_memory: budget
    such as "8GiB". dtype: auto | bf16 | fp16 | fp32 | q8 | q4_m | q4. device: auto | cuda | cuda:N | cpu | emulated.
    max_context: tokens of one sequence. max_batch: sequences decoded together. seed: of requests that bring none.
    num_threads: of the CPU lane. hardware: the profile to plan with. kv_dtype: of keys and values, auto | bf16 | fp32 |
    q8 | q4 (auto: fp32 beside fp32 weights, else bf16). elastic keeps a copy in DRAM of what is in GPU memory, so that
    `resize` works and the cache may take GPU memory from the weights as it grows. kv_tokens: tokens that the cache
    holds for all sequences together, None is max_context for each. prefix_cache keeps what was computed for prompts
    that begin alike. handover: how GPU and CPU lane wait for each other, auto | events | flags | graph. overlap=False
    runs the lanes one after another. progress shows a bar while loading. max_waiting: a call that finds so many
    requests waiting for a place raises QueueFullError. needs_text=True refuses a model whose tokenizer is missing or
    cannot be opened, while its weights load, as does a function of tokenizer and planned model that raises; else it
    warns and takes ids. speculate: off | ngram | auto, a small model of the same vocabulary, or an EAGLE-3 head: who
    guesses next tokens, as many as pay: those that the sampler draws are kept. "ngram" looks where text came before,
    "auto" is the same; a small model or head shares threads and budget. None: as the policy says.

    A request with `max_tokens` reserves the cache that it may need. One without takes pages as it grows; when they run
    out, the youngest of the lowest priority waits again and later goes on where it was.

    Thread-safe: calls from several threads take turns, step by step, and decode together. `add`, `abort` and `close`
    may also come from signal handlers, finalisers and callbacks, in the middle of a step. Close it, or use it as a
    context manager; raises errors of `hetero_attn.errors` and PolicyError. A forked child cannot use it: processes that
    are to share a machine load a model each, under multiprocessing's spawn method.
    """

    def __init__(
        self,
        model: str | Path,
        policy: str | Path | Policy = "auto",
        gpu_memory: str | int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_context: int | None = None,
        seed: int | None = 0,
        *,
        max_batch: int | None = None,
        num_threads: int | None = None,
        hardware: HardwareProfile | str | None = None,
        page_size: int = PAGE_TOKENS,
        elastic: bool = False,
        kv_tokens: int | None = None,
        prefix_cache: bool = True,
        kv_dtype: str = "auto",
        file: str | None = None,
        tokenizer: str | Path | None = None,
        overlap: bool = True,
        handover: str = "auto",
        progress: bool = True,
        max_waiting: int | None = None,
        needs_text: bool | Callable[[Tokenizer, PlannedModel], object] = False,
        speculate: str | Path | None = None,
    ) -> None:
        wishes = {name: value for name, value in locals().items() if name != "self"}
        self._load(LoadOptions(**wishes))

    def _load(self, options: LoadOptions) -> None:
        with memory_named(f"planning {options.model}"):
            if options.asks_for_this_machine:
                refresh_profile(lambda: refuse_early(options))
            drafted = settle_drafted(options)
        planned, self._progress = drafted.planned, options.progress
        expect_room(*drafted.plans)
        opening, self.engine = load_beside(planned, options)
        self._replanner = Replanner(self.engine, planned)
        self._rebalancer = Rebalancer(self.engine, self._replanner)
        speculator = load_speculator(self.engine, options, drafted, opening)
        planned.headers.forget()
        self._scheduler = Scheduler(self.engine, speculator)
        self._turns = Turns(self.engine, self._scheduler)
        self._intake = Intake(self._replanner, self._turns, opening, options)
        self._finalizer = weakref.finalize(self, self._turns.close_soon)

    @property
    def planned(self) -> PlannedModel:
        """The model and everything that was decided about it, the plan in force included."""
        return self._replanner.planned

    @property
    def plan(self) -> Plan:
        """What lives and runs where."""
        return self.planned.plan

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None for a model without one; it is opened while the weights load."""
        return self._intake.tokenizer

    @property
    def grammars(self) -> Grammars:
        """What makes answers follow a schema or a grammar."""
        return self._intake.grammars

    def default_params(self, **given: Any) -> SamplingParams:
        """The parameters of a request that brings none: as generation_config.json suggests, with `given` over it.

        Without a suggestion temperature is 0.7 and top_p 0.95. Raises SamplingError for a given value out of range.
        """
        return default_params(self.planned.path, **given)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, *, priority: int = 0
    ) -> list[RequestOutput]:
        """Complete every prompt; results come in the order of the prompts.

        prompts: one or several, each a string or a list of token ids. params: one for all, or one for each; None is
        `default_params()`. Raises PromptError before anything is computed. What prompts share is computed once.
        """
        prompts = as_prompts(prompts)
        each = zip(prompts, for_each(params, len(prompts)), strict=True)
        requests = [self._intake.request(*pair, priority) for pair in each]
        self._run(requests)
        return [self._turns.output_of(request) for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> Stream:
        """Complete one prompt, yielding text as it becomes certain: never half a character or part of a stop string.

        Leaving the loop early ends the request. Streams may be read in any order, several in one thread, beside
        `generate` and `step` of any thread: each yields its whole text once.
        """
        request = self._intake.request(prompt, params, priority)
        return Stream(self._turns, request, self.step, self._bar([request]))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params = None,
        *,
        template_variables: Mapping[str, object] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer a conversation, a list of {"role", "content"}, through the model's chat template.

        content: text, or a list of {"type": "text", "text"} parts, which are joined. Several conversations, a list of
        such lists, give a list of answers. params: as for `generate`. template_variables: what the template knows
        beside the messages, such as {"enable_thinking": False}, tools or documents.
        """
        if not are_conversations(messages):
            return self.generate([self._intake.chat_prompt(messages, template_variables)], params)[0]
        return self.generate([self._intake.chat_prompt(each, template_variables) for each in messages], params)

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, object] | None = None,
    ) -> Stream:
        """As `chat` of one conversation, yielding pieces like `stream`."""
        return self.stream(self._intake.chat_prompt(messages, template_variables), params)

    def add(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> Request:
        """Queue a prompt for `step`, as a server does; returns at once. Raises PromptError.

        priority: higher goes first, in order. The request's `token_ids` and `text` grow with every step; once
        `finish_reason` is set, `output()` is complete.
        """
        request = self._intake.request(prompt, params, priority)
        self._turns.add(request)
        return request

    def add_scoring(self, prompt: Prompt, logprobs: int = 0, *, priority: int = 0) -> Request:
        """Queue a prompt whose own tokens are to be scored, not continued, for `step`. Raises PromptError.

        logprobs: how many of the most likely tokens to report at each position beside the prompt's own; -1 for all.
        Once the request has ended, `request.scores.tokens` holds an entry for each token of the prompt: None for the
        first, else its natural log-probability by the very same plan. The logits themselves are not kept.
        """
        request = self._intake.scored(prompt, logprobs, priority)
        self._turns.add(request)
        return request

    def step(self) -> tuple[Request, ...]:
        """Compute the next token of every sequence that decodes, and prompts' next rows; returns whose turn it was.

        Requests of every thread take part, those of `generate` and `stream` too. Empty when there is nothing to do.
        Raises BusyError inside a step of the same thread.
        """
        with memory_named("computing a step"):
            return self._turns.alone(self._step)

    def abort(self, request: Request) -> None:
        """End a request where it stands, or after the step that runs; what it generated stays readable. Never waits."""
        if not isinstance(request, Request):
            raise ArgumentError(f"request is {request!r:.60}; it must be one that `add` returned")
        self._turns.abort(request)

    def logits(self, token_ids: Prompt) -> torch.Tensor:
        """Logits after each of `token_ids`, float32 [len(token_ids), vocab_size], through the very same plan.

        token_ids: or a string, which stands for its tokens. Waits for its place in the queue like any prompt; the steps
        that it takes are everybody's.
        """
        request = self._intake.scoring(token_ids)
        self._run([request])
        request.output()
        with memory_named("collecting logits"), self._turns.beside_steps(), self.engine.lanes.torch_at_rest():
            return torch.cat(request.scores)

    def resize(self, gpu_memory: str | int) -> Plan:
        """Change the GPU budget of an elastic model, up or down, without loading anything again; returns the new plan.

        Requests in flight keep every token: the change is made between two steps. Their next tokens are those of the
        new plan, whose lanes add in another order: in fp32 logits agree to 1e-11, while with bf16 or int8 activations a
        greedy token can turn where two are nearly as likely. On CUDA the memory is one piece, taken at load: a smaller
        budget binds the model, but frees nothing for other programs. Raises MemoryBudgetError, and leaves the model as
        it was, for a budget too small (the message names the smallest that works), for a model loaded without
        `elastic`, and on CUDA for a budget above that of the load.
        """
        size = checked_arguments(gpu_memory=gpu_memory)["gpu_memory"]
        if size is None:
            raise ArgumentError("gpu_memory is None; give the new budget, such as 6GiB")
        return self._turns.alone(lambda: self._replanner.resize(parse_bytes(size)))

    def report(self) -> LaneReport:
        """Where the time of all steps so far went, by phase: `.table()`, `.to_dict()`, `.reset()`."""
        return self.engine.report

    def check_context(self, tokens: int, reserve: int = 0) -> None:
        """Raise PromptError unless `tokens`, and `reserve` more, fit the context that the plan reserves."""
        self._intake.check_context(tokens, reserve)

    def close(self) -> None:
        """End requests with an EngineDeadError, stop threads, free memory; idempotent. Waits a while for a step."""
        self._turns.close()

    def __repr__(self) -> str:
        plan = self.plan
        return f"LLM({plan.model!r}, {plan.workload.weight_dtype} on {plan.device}, context {plan.max_context})"

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _step(self) -> tuple[Request, ...]:
        if not self._scheduler.has_work:
            return ()
        self._replanner.follow(lambda: self._scheduler.tokens)
        active = self._scheduler.step()
        self._rebalancer.follow()
        return active

    def _run(self, requests: Sequence[Request]) -> None:
        bar = self._bar(requests)
        try:
            for request in requests:
                self._turns.add(request)
            with memory_named("computing a step"):
                while self._turns.slice_for(requests, self._step):
                    bar.update()
        except BaseException:
            for request in requests:
                self.abort(request)
            raise
        finally:
            bar.close()

    def _bar(self, requests: Sequence[Request]) -> PrefillBar:
        return PrefillBar(requests, self.engine.prefill_chunk, self._progress)
