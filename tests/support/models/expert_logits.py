"""What mixtures of experts answer to one prompt, and how near that must be to an oracle in float32."""

import torch

from tests.support.models.runtime import make_engine, run_logits

EXACT = 1e-10
TOKENS = torch.randint(307, (50,), generator=torch.Generator().manual_seed(2)).tolist()


def logits_of(path, plan, prompt_tokens=40, overlap=True):
    engine = make_engine(path, plan, overlap=overlap)
    try:
        return run_logits(engine, TOKENS, prompt_tokens)
    finally:
        engine.close()
