"""What a server says when it is ready: what it serves, how fast that is expected to be, and what clients are set to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero_attn.server.settings import ServerSettings
from placement.plan.units import format_bytes, rounded_speed
from placement.plan.words import expected

if TYPE_CHECKING:  # it needs torch, whose import would keep a server from answering while it loads
    from hetero_attn.llm import LLM


AGENTS_CONTEXT = 65536  # what coding agents are advised to have


def banner(llm: LLM, settings: ServerSettings) -> str:
    """The lines, none wider than 100 columns unless a name is long."""
    plan, address = llm.plan, settings.address
    name, key = settings.served_name or plan.model, "KEY" if settings.api_key else "none"
    speed = ""
    if predicted := expected(plan.predicted, plan.device):
        phases = predicted.prefill, predicted.decode
        prefill, decode = (rounded_speed(phase.tokens_per_s) for phase in phases)
        speed = f"\nexpected: {prefill} tokens/s of a prompt, {decode} tokens/s of an answer"
    return (
        f"{name} is served on {address}{', with a page for people' if settings.has_page else ''}\n"
        f"context {plan.max_context} tokens (--context), {plan.max_batch} sequences at once (--batch), "
        f"{settings.max_waiting} more may wait (--max-waiting){speed}{_larger_context(llm)}\n"
        "settings of clients:\n"
        f"  openai-python  OpenAI(base_url='{address}/v1', api_key='{key}')\n"
        f"  Open WebUI     OPENAI_API_BASE_URL={address}/v1 OPENAI_API_KEY={key}\n"
        f"  aider          aider --openai-api-base {address}/v1 --openai-api-key {key} --model openai/{name}\n"
        f"  Continue       provider: vllm, apiBase: {address}/v1, apiKey: {key}, model: {name}\n"
        f"  lm-eval        --model local-completions --model_args base_url={address}/v1/completions,model={name}"
    )


def _larger_context(llm: LLM) -> str:
    """What the context that agents want would take, where there is less and the model can have it."""
    plan, most = llm.plan, llm.engine.config.max_position_embeddings
    wanted = min(AGENTS_CONTEXT, most)
    if wanted <= plan.max_context:
        return ""
    now = sum(place.get("kv", 0) for place in plan.memory.to_dict().values())
    then = now * wanted // plan.max_context
    return f"\n--context {wanted} would take about {format_bytes(then)} for the cache, in place of {format_bytes(now)}"
