"""What a client wants, whichever protocol it speaks: prompts, how to choose tokens, how many answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetero_attn.server.dialogue.tools import NO_TOOLS, Tools

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages for the chat template. tools: what the model may call. variables: what the template gets beside.

    opens_answer: end with the words that open the assistant's turn. continues: the last message is the answer's begin.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Tools = NO_TOOLS
    variables: Mapping[str, Any] = field(default_factory=dict)
    opens_answer: bool = True
    continues: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request of a client.

    prompts: one or several, or a conversation in their place. wishes: given sampling parameters by their name in
    `SamplingParams`; what is not given is as the model suggests. choices: answers to each prompt. For errors, names:
    what the client calls parameters that have another name there, and field: where the body holds the prompt.
    """

    prompts: Sequence[Prompt] | Conversation
    wishes: Mapping[str, Any] = field(default_factory=dict)
    choices: int = 1
    priority: int = 0
    names: Mapping[str, str] = field(default_factory=dict)
    field: str = "messages"

    @property
    def fields(self) -> Mapping[str, str]:
        """`names`, with that of the tools whose calls follow a grammar."""
        has_tools = isinstance(self.prompts, Conversation) and self.prompts.tools.callable
        return {"grammar": "tools", **self.names} if has_tools else self.names
