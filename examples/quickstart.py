"""The six lines that most programs need.

python examples/quickstart.py [MODEL] [GPU_MEMORY]      # MODEL: a directory or a hub id; GPU_MEMORY: such as 8GiB
"""

import sys
from pathlib import Path

from hetero_attn import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "tiny"
gpu_memory = sys.argv[2] if len(sys.argv) > 2 else None

with LLM(model, gpu_memory=gpu_memory) as llm:
    print(llm.plan.table())
    prompts = ["A list is", "Return the number of"]
    for prompt, output in zip(prompts, llm.generate(prompts, SamplingParams(max_tokens=32, temperature=0.0))):
        print(f"{prompt}{output.text}\n[{output.finish_reason}, {output.metrics.decode_tokens_per_s:.1f} tokens/s]\n")
