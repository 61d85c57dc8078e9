"""Functions that a client offers to the model, and how free the model is to call them."""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hetero_attn.server.dialogue.shapes import as_object
from hetero_attn.server.failures import ApiError

MOST_TOOLS = 512
NAME = re.compile(r"[\w.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tools:
    """functions: each {"name", "description", "parameters"}. choice: auto, none, required, or a function's name that
    begins with "=". parallel: whether one answer may call several."""

    functions: tuple[Mapping[str, Any], ...] = ()
    choice: str = "auto"
    parallel: bool = True

    @property
    def callable(self) -> tuple[Mapping[str, Any], ...]:
        """Those that the model may call."""
        if self.choice == "none":
            return ()
        return tuple(each for each in self.functions if self.choice in ("auto", "required", "=" + each["name"]))

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice not in ("auto", "none")

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """Schemas of the arguments by name, of those that may be called."""
        return {each["name"]: each["parameters"] for each in self.callable}

    @property
    def for_template(self) -> list[dict[str, Any]]:
        """The tools in the form that chat templates take, none where the choice is "none"."""
        return [] if self.choice == "none" else [{"type": "function", "function": dict(e)} for e in self.functions]


NO_TOOLS = Tools()


def tools_of(functions: Sequence[Any], choice: str, parallel: bool | None, where: str = "tools") -> Tools:
    """Tools from {"name", "description", "parameters"} each. Raises ApiError that names the one at fault."""
    if len(functions) > MOST_TOOLS:
        raise ApiError(400, f"{where} holds {len(functions)} tools, at most {MOST_TOOLS} are allowed", param=where)
    checked = tuple(_function(each, f"{where}.{number}") for number, each in enumerate(functions))
    found = Tools(checked, choice, parallel is not False)
    if found.must_call and not found.callable:
        raise ApiError(
            400, f"tool_choice is {choice.lstrip('=')!r:.60}, and {where} holds none such", param="tool_choice"
        )
    return found


def _function(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str):
        raise ApiError(400, f"{where} is no function with a name; give name, description and parameters", param=where)
    if not NAME.fullmatch(name):
        raise ApiError(
            400, f"{where} is called {name!r:.60}; names are 1 to 128 of letters, digits, _ . : -", param=where
        )
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise ApiError(400, f"{where}.parameters is {parameters!r:.40}; it must be a JSON schema", param=where)
    description = function.get("description")
    return {"name": name, "description": description if isinstance(description, str) else "", "parameters": parameters}


def openai_choice(choice: Any) -> str:
    """`tool_choice` of chat completions and of responses as `Tools` has it. Raises ApiError."""
    if choice in (None, "auto", "none", "required"):
        return choice or "auto"
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        name = as_object(choice.get("function") or choice, "tool_choice.function").get("name")
        if isinstance(name, str):
            return "=" + name
    raise ApiError(
        400,
        f"tool_choice is {choice!r:.60}; it must be auto, none, required or name a function",
        param="tool_choice",
    )


def call_id(letters: int) -> str:
    """A new name of a call: `letters` letters and digits where a template wants that many, else as OpenAI's."""
    return secrets.token_hex(letters)[:letters] if letters else f"call_{secrets.token_hex(12)}"
