"""How tests of arguments load a model, and what they ask it for."""

from hetero_attn import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
OPTIONS = {"device": "cpu", "dtype": "fp32", "max_context": 64, "num_threads": 1}
