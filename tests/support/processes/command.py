"""The command in this process, and a stand-in for the Python API that it calls."""

from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from typer.testing import CliRunner, Result

from hetero_attn import SamplingParams
from hetero_attn.cli import app
from hetero_attn.serving.request import Metrics, Piece, RequestOutput

ROOT = Path(__file__).resolve().parents[3]
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
        config = SimpleNamespace(bos_token_id=None, vocab_size=1 << 30)
        self.planned = SimpleNamespace(path=Path(model), config=config, plan=self.plan)
        self.tokenizer = FakeTokenizer()
        if callable(needs_text := options.get("needs_text")):
            needs_text(self.tokenizer, self.planned)
        FakeLLM.made.append(self)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def stream(self, prompt: str, params: Any) -> "FakeStream":
        return FakeStream(self._pieces(prompt, params))

    def _pieces(self, prompt: str, params: Any) -> Generator[Piece]:
        self.asked.append((self.tokenizer.given.get(prompt, prompt) if isinstance(prompt, tuple) else prompt, params))
        for token_id, word in enumerate(WORDS):
            yield Piece(word, (token_id,))
        if not isinstance(self.ending, str):
            raise self.ending
        yield Piece("", (), self.ending, METRICS)

    def stream_chat(self, messages: list[dict[str, str]], params: Any, template_variables: Any = None) -> "FakeStream":
        self.variables = template_variables
        return self.stream([dict(message) for message in messages], params)

    @staticmethod
    def default_params(**given: Any) -> SamplingParams:
        return SamplingParams(**given)


class FakeTokenizer:
    """Every word is a token, and so is every role; `given` has what was encoded by its ids, which no other text has."""

    chat_template = "{{ enable_thinking }}"
    template_variables = frozenset({"enable_thinking"})

    def __init__(self) -> None:
        self.given: dict[tuple[int, ...], Any] = {}

    def encode(self, text: str) -> list[int]:
        return self._ids(text, len(text.split()))

    def encode_chat(self, messages: list[dict[str, str]], template_variables: Any = None) -> list[int]:
        return self._ids(messages, sum(1 + len(m["content"].split()) for m in messages))

    def _ids(self, given: Any, count: int) -> list[int]:
        ids = [len(self.given)] * count
        self.given[tuple(ids)] = given
        return ids


class FakeStream(Iterator[Piece]):
    """Pieces as they come, and the answer as far as they came."""

    def __init__(self, pieces: Generator[Piece]) -> None:
        self._pieces, self._came = pieces, []

    def __next__(self) -> Piece:
        self._came.append(next(self._pieces))
        return self._came[-1]

    def close(self) -> None:
        self._pieces.close()

    def output(self) -> RequestOutput:
        text = "".join(piece.text for piece in self._came)
        token_ids = tuple(each for piece in self._came for each in piece.token_ids)
        return RequestOutput(text, token_ids, self._came[-1].finish_reason or "abort", (7, 8), None, METRICS)


def contents(llm: FakeLLM) -> list[list[str]]:
    """What each question was asked with."""
    return [[message["content"] for message in messages] for messages, _ in llm.asked]


def run(*arguments: str, typed: str | None = None) -> Result:
    """Call the command in this process."""
    return CliRunner().invoke(app, list(arguments), input=typed)
