"""A conversation through the model's own chat template; every answer is streamed and then remembered.

python examples/chat.py [MODEL]
"""

import sys
from pathlib import Path

from hetero_attn import LLM, SamplingParams

QUESTIONS = ("What is json.JSONDecoder?", "What is a list?")
PARAMS = SamplingParams(max_tokens=48, temperature=0.7, top_p=0.95, seed=0)


def main(model: str | Path) -> None:
    """Ask every question in turn, with the conversation so far."""
    messages: list[dict[str, str]] = []
    with LLM(model, max_context=1024) as llm:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            print(f"> {question}")
            answer = ""
            for piece in llm.stream_chat(messages, PARAMS):
                print(piece.text, end="", flush=True)
                answer += piece.text
            print("\n")
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "tiny")
