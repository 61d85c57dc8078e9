"""What a command says to a model first: encoded and checked once, while the weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetero_attn import SamplingParams
    from hetero_attn.planning.settle import PlannedModel
    from hetero_attn.serving.text.tokenizer import Tokenizer


class FirstWords:
    """`needs_text` of `LLM` for a prompt, or for a conversation: refuses what could not be answered as soon as the
    tokenizer is open. Once the model is loaded, `params` and `token_ids` are those of the request.

    wishes: of the sampling, over what the model suggests. prompt: text, or messages for the chat template; None where a
    person will write them, so that there has to be a template and `token_ids` stay empty.
    """

    def __init__(self, wishes: dict[str, Any], prompt: str | list[dict[str, str]] | None = None) -> None:
        self._wishes, self._prompt = wishes, prompt
        self.token_ids: tuple[int, ...] = ()
        self.params: SamplingParams

    def __call__(self, tokenizer: Tokenizer, planned: PlannedModel) -> None:
        # Imported with the model by now, with the collector at rest.
        from hetero_attn.serving.defaults import default_params
        from hetero_attn.serving.text.first_words import answerable, expect_template

        self.params = default_params(planned.path, **self._wishes)
        if self._prompt is None:
            expect_template(tokenizer, planned.path)
        else:
            self.token_ids = answerable(self._prompt, tokenizer, planned)
