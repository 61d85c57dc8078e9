"""What a model is to be asked first, looked at as soon as its tokenizer is open: beside the loading of weights, which
ends where it could not be answered."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetero_attn.errors import PromptError
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.serving.prompts import as_token_ids
from hetero_attn.serving.text.tokenizer import Tokenizer, no_template


def expect_room_for(tokens: int, reserve: int, most: int) -> None:
    """Raise PromptError unless a context of `most` tokens holds `tokens` and `reserve` more."""
    if tokens + reserve > most:
        raise PromptError(
            f"the prompt has {tokens} tokens, but the context of this plan holds {most} including "
            "the answer; shorten the prompt or load with a larger max_context"
        )


def checked_ids(token_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Token ids of a prompt; raises PromptError for none at all, and for one that the model has no embedding for."""
    ids = as_token_ids(token_ids)
    if not ids:
        raise PromptError("the prompt has no tokens; give at least one")
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise PromptError(f"token {token_id!r} at position {position} of the prompt is not in 0..{vocab_size - 1}")
    return ids


def begun(token_ids: Sequence[int], bos_token_id: int | None) -> Sequence[int]:
    """A prompt's tokens; of an empty one the token that texts begin with. Raises PromptError where there is none."""
    if token_ids:
        return token_ids
    if bos_token_id is None:
        raise PromptError("the prompt is empty and this model has no token to begin with; give at least one token")
    return [bos_token_id]


def answerable(prompt: str | Sequence[dict[str, Any]], tokenizer: Tokenizer, planned: PlannedModel) -> tuple[int, ...]:
    """Token ids of a prompt or a conversation. Raises PromptError, as the request for it would, where the context does
    not hold them with a token of the answer, the model cannot read them, or there is no chat template."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
    known = checked_ids(begun(ids, planned.config.bos_token_id), planned.config.vocab_size)
    expect_room_for(len(known), 1, planned.plan.max_context)
    return known


def expect_template(tokenizer: Tokenizer, path: Path) -> None:
    """Raise PromptError for a tokenizer without a chat template. path: of the model."""
    if not tokenizer.chat_template:
        raise no_template(path)
