"""What a server does: requests arrive, leave and are given up at any step, and all of them decode together.

    python examples/serve_loop.py [MODEL]      # MODEL: a directory or a hub id

Every prompt begins with the same instructions, which are computed once.
"""

import sys
from pathlib import Path

from hetero_attn import LLM, SamplingParams

INSTRUCTIONS = "This page of the Python documentation explains, in a few words and with an example, one thing. " * 3
QUESTIONS = ["A list is", "A tuple is", "Return the", "An iterator is", "The file"]

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "tiny"
params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)

with LLM(model, max_context=512, max_batch=8, kv_tokens=1024, page_size=16, progress=False) as llm:
    arriving, running, ended = list(QUESTIONS), [], []
    while arriving or running:
        if arriving:  # one request a step, as if they came over a network
            running.append(llm.add(INSTRUCTIONS + arriving.pop(0), params))
        llm.step()
        if len(ended) == 2 and running:
            llm.abort(running[-1])  # a client hung up
        ended += [request for request in running if request.finish_reason]
        running = [request for request in running if not request.finish_reason]
    for request in ended:
        metrics = request.metrics
        reused = f"{metrics.cached_prompt_tokens} of {metrics.prompt_tokens} prompt tokens reused"
        print(f"[{request.finish_reason}, {reused}] ...{request.text[:40]!r}")
    shared = llm.plan.page_size * (min(request.metrics.prompt_tokens for request in ended) // llm.plan.page_size - 1)
    again = sum(request.metrics.cached_prompt_tokens < shared for request in ended[1:]) * shared
    print(f"{again} prompt tokens computed twice")
