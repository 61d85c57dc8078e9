"""The command in this process, and a stand-in for the Python API that it calls."""

from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from typer.testing import CliRunner, Result

from hetero_attn import SamplingParams
from hetero_attn.cli import app
from hetero_attn.serving.request import Metrics, Piece, RequestOutput

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "examples" / "tiny")
METRICS = Metrics(prompt_tokens=3, generated_tokens=5, prefill_s=0.5, decode_s=2.0)
WORDS = ("Once", " upon", " a time")


class FakeLLM:
    """Remembers how it was made and asked; answers `WORDS`, or ends as `ending` says."""

    made: list["FakeLLM"] = []
    ending: str | type[BaseException] = "stop"
    context = 1000

    def __init__(self, model: str, **options: Any) -> None:
        self.model, self.options, self.asked, self.closed = model, options, [], False
        self.plan = SimpleNamespace(
            model=model,
            max_context=self.context,
            device="cpu",
            num_threads=2,
            predicted=None,
            table=lambda width: "the plan",
            workload=SimpleNamespace(weight_dtype="bf16", kv_dtype="bf16"),
        )
        # Every word is a token, and so is every role.
        self.tokenizer = SimpleNamespace(
            chat_template="{{ enable_thinking }}",
            encode_chat=lambda messages, template_variables: [
                0 for m in messages for _ in (m["role"], *m["content"].split())
            ],
        )
        FakeLLM.made.append(self)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def generate(self, prompts: list[str], params: Any) -> list[RequestOutput]:
        self.asked.append((prompts, params))
        return [RequestOutput("".join(WORDS), (1, 2, 3), self.ending, (7, 8), None, METRICS)]

    def stream(self, prompt: str, params: Any) -> Generator[Piece]:
        self.asked.append((prompt, params))
        for token_id, word in enumerate(WORDS):
            yield Piece(word, (token_id,))
        if not isinstance(self.ending, str):
            raise self.ending
        yield Piece("", (), self.ending, METRICS)

    def stream_chat(
        self, messages: list[dict[str, str]], params: Any, template_variables: Any = None
    ) -> Generator[Piece]:
        self.variables = template_variables
        return self.stream([dict(message) for message in messages], params)

    def chat(self, messages: list[dict[str, str]], params: Any) -> RequestOutput:
        return self.generate([messages], params)[0]

    @staticmethod
    def default_params(**given: Any) -> SamplingParams:
        return SamplingParams(**given)


def contents(llm: FakeLLM) -> list[list[str]]:
    """What each question was asked with."""
    return [[message["content"] for message in messages] for messages, _ in llm.asked]


def run(*arguments: str, typed: str | None = None) -> Result:
    """Call the command in this process."""
    return CliRunner().invoke(app, list(arguments), input=typed)
