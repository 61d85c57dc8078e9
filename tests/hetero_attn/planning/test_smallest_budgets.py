"""A budget that is too small is told the smallest that works: that one works, and one percent less does not.

What is found for one prefill chunk holds for that chunk alone, and which chunks there are follows the budget: a message
that was made for small chunks named a size at which the planner then asked for larger ones.
"""

import json
import random
import re

import pytest

from hetero_attn.errors import MemoryBudgetError
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from placement import Policy
from tests.support.models.published_configs import CONFIGS
from tests.support.planning.best_plans import MACHINES

MIB = 2**20
RULES = {
    "no rules": "",
    "the cache": 'rules:\n  - {match: "*.kv", kv: {gpu_heads: all}}\n',
    "some layers": 'rules:\n  - {match: "layers.0.*", gpu: 1}\n',
    "streams": "rules:\n  - {match: head, gpu: 0.25, stream: 0.5}\n",
}


def wishes(folder, name, layers, rules, **sizes):
    """A published model cut to a few layers, as a user would ask for it."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | {"num_hidden_layers": layers}))
    policy = Policy.parse(RULES[rules], rules).model_copy(update=sizes.pop("policy", {}))
    return LoadOptions(model=folder, policy=policy, device="cuda", progress=False, **sizes)


def smallest(options):
    """The budget in bytes that the refusal names, None where there is no refusal; and the place."""
    try:
        settle(options)
    except MemoryBudgetError as error:
        return int(re.search(r"smallest that works is (\d+) bytes", str(error))[1])
    return None


def drawn(seed):
    """Wishes that are refused, or may be: sizes, a machine, and a budget between next to nothing and a GiB."""
    draw = random.Random(seed)
    sizes = {
        "dtype": draw.choice(("bf16", "q8", "q4")),
        "max_context": draw.choice((512, 1024, 4096, 20000)),
        "max_batch": draw.choice((1, 1, 4)),
        "hardware": draw.choice(MACHINES),
    }
    name, layers, rules = draw.choice(sorted(CONFIGS)), draw.choice((1, 2, 4)), draw.choice(sorted(RULES))
    layers = 4 if name == "qwen3-next-80b" else layers  # of which one has a cache
    return name, layers, rules, sizes, 2 ** draw.uniform(20, 30)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.matrix) for seed in range(6, 40))])
def test_the_budget_that_a_refusal_names_works_and_one_percent_less_does_not(tmp_path, seed):
    name, layers, rules, sizes, budget = drawn(seed)

    def named(gpu_memory):
        return smallest(wishes(tmp_path, name, layers, rules, gpu_memory=gpu_memory, **sizes))

    least = named(int(budget)) or named(MIB)

    assert named(least) is None, f"{least} bytes were to work"
    assert named(int(0.99 * least)) == least


def test_a_larger_budget_is_not_refused_for_larger_chunks(tmp_path):
    """400 MiB was told of 494, for chunks of which no budget of 494 MiB has any."""
    sizes = {"dtype": "bf16", "max_context": 1024, "hardware": "rtx3060-ddr4"}
    least = smallest(wishes(tmp_path, "qwen3-30b", 1, "no rules", gpu_memory=MIB, **sizes))

    for budget in (least, *range(least + 16 * MIB, 700 * MIB, 32 * MIB)):
        assert smallest(wishes(tmp_path, "qwen3-30b", 1, "no rules", gpu_memory=budget, **sizes)) is None
