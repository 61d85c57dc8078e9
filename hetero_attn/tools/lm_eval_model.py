"""A model of this package inside of lm-evaluation-harness, as `--model hetero_attn` (extra `[eval]`).

    python -m hetero_attn.tools.lm_eval_model run --model hetero_attn --model_args pretrained=examples/tiny --tasks ...

takes lm_eval's own options. Arguments of the model are those of `LLM`, with `pretrained` for the model. A prompt's
tokens are scored through the very plan that generates, and prompts that begin alike compute what they share once.
"""

from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401  registers the harness' own models, which one of ours alone would keep from being looked up
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from hetero_attn.llm import LLM
from hetero_attn.serving.prompt_scores import PromptScores
from hetero_attn.serving.request import Request
from hetero_attn.serving.sampling_params import SamplingParams

AT_ONCE = 64  # prompts in the queue
DEFAULT_TOKENS = 256
_RENAMED = {"max_gen_toks": "max_tokens", "until": "stop"}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "stop", "seed")


@register_model("hetero_attn")
class HeteroLM(TemplateLM):
    """One loaded model, as the harness asks it.

    pretrained: as `LLM`'s model; options: its other arguments. max_length: tokens of a prompt and its answer, by
    default the context of the plan. batch_size: sequences computed together.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        places = int(batch_size) if str(batch_size).isdigit() else max_batch_size or 8
        options = {"max_context": max_length, "progress": False, "needs_text": True, **options}
        self._llm = LLM(pretrained, device=device or "auto", max_batch=places, **options)
        self.max_length = max_length or self._llm.plan.max_context
        self.tokenizer = self._llm.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context is scored behind."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The model's name, for caches of the harness."""
        return self._llm.plan.model

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, without special tokens unless they are asked for."""
        return self.tokenizer.encode(string, bool(add_special_tokens))

    def apply_chat_template(self, chat_history: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model's template makes of it."""
        ids = self.tokenizer.encode_chat(chat_history, add_generation_prompt, None, not add_generation_prompt)
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Natural log-likelihood of each whole text, in windows as long as the context that overlap by one token."""
        found = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to each text, up to the strings that end it."""
        prompts, params = [], []
        for text, wishes in (request.args for request in requests):
            params.append(_params(wishes))
            prompts.append(self.tok_encode(text)[-(self.max_length - params[-1].max_tokens) :])
        return [output.text for output in self._llm.generate(prompts, params)]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for first in range(0, len(requests), AT_ONCE):
            some = requests[first : first + AT_ONCE]
            prompts = [(context + rest)[-self.max_length :] for _, context, rest in some]
            scored = self._scored(prompts)
            found += [_sum(request, len(rest)) for request, (_, _, rest) in zip(scored, some)]
        return found

    def _scored(self, prompts: Sequence[Sequence[int]]) -> list[Request]:
        requests = [self._llm.add_scoring(prompt, logprobs=1) for prompt in prompts]
        while any(request.finish_reason is None for request in requests):
            self._llm.step()
        for request in requests:
            request.output()  # raises what ended it early
        return requests


def _sum(request: Request, count: int) -> tuple[float, bool]:
    """Log-likelihood of the last `count` tokens of a prompt, and whether each of them is the likeliest."""
    assert isinstance(request.scores, PromptScores)
    entries = [entry for entry in request.scores.tokens[len(request.prompt_token_ids) - count :] if entry is not None]
    return sum(entry.logprob for entry in entries), all(
        entry.logprob == max(logprob for _, logprob in entry.top_logprobs) for entry in entries
    )


def _params(wishes: dict[str, Any]) -> SamplingParams:
    named = {_RENAMED.get(name, name): value for name, value in wishes.items()}
    given = {"temperature": 0.0, "max_tokens": DEFAULT_TOKENS} | {k: v for k, v in named.items() if k in _SAMPLING}
    if not wishes.get("do_sample", given["temperature"] > 0):
        given["temperature"] = 0.0
    return SamplingParams(**given)


if __name__ == "__main__":
    cli_evaluate()
