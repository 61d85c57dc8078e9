"""Policies: what is accepted, and that every fault is reported at once with its place, value, rule and nearest name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import HardwareProfile, Policy, PolicyError, make_plan, policy_schema, shipped_policies
from placement.plan.units import format_bytes, parse_bytes
from placement.policy.bind import bind, matches
from placement.policy.fields import Share, parse_share
from tests.support.planning.planning_models import tiny

EMULATED = HardwareProfile.named("emulated")


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(PolicyError) as error:
        Policy.parse(text, "p.yaml")
    return error.value.problems


def bound(text: str, device: str = "emulated"):
    return bind(Policy.parse(text, "p.yaml"), tiny(), device)


def bind_problems(text: str, device: str = "emulated") -> tuple[str, ...]:
    with pytest.raises(PolicyError) as error:
        bound(text, device)
    return error.value.problems


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policy_is_explained_and_round_trips(name):
    policy = Policy.named(name)

    assert Policy.load(name).model_dump() == Policy.parse(policy.to_yaml()).model_dump() == policy.model_dump()


def test_shipped_policies_are_the_promised_ones():
    assert set(shipped_policies()) == {"auto", "cpu_only", "gpu_only", "stream_only", "host_attention", "throughput"}


def test_empty_text_is_the_automatic_policy():
    assert Policy.parse("").model_dump() == Policy().model_dump()


def test_sizes_and_auto_are_understood():
    policy = Policy.parse("gpu_memory: 6GiB\npinned_memory: 512 MiB\nhost_memory: auto\ncontext: 4096\nthreads: auto\n")

    assert (6 * 2**30, 512 * 2**20, None, 4096, None) == (
        policy.gpu_memory,
        policy.pinned_memory,
        policy.host_memory,
        policy.context,
        policy.threads,
    )


def test_every_problem_is_reported_in_one_pass_with_its_place():
    text = "version: 1\nobjectiv: latency\nrules:\n  - match: head\n    gpu: 1.5\n"
    text += "  - match: layers.0.qkv\n    cpuu: 1\n    gpu: 1\n"

    found = problems(text)

    assert 3 == len(found)
    assert found[0].startswith("p.yaml:2:1: objectiv: unknown key; did you mean 'objective'?")
    assert found[1].startswith("p.yaml:5:5: rules[0].gpu: 1.5: must be a fraction")
    assert found[2].startswith("p.yaml:7:5: rules[1].cpuu: unknown key; did you mean 'cpu'?")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu_memory: 1\ngpu_memory: 2\n", "p.yaml:2:1: gpu_memory: the key is given twice"),
        ("rules:\n  - match: *.qkv\n    gpu: 1\n", "must be quoted"),
        ("rules:\n  - match: *qkv\n    gpu: 1\n", "must be quoted"),
        ("rules:\n  - match: [a-z]+\n    gpu: 1\n", "must be quoted"),
        ("a: &x 1\n", "p.yaml:1:4: anchors are not allowed"),
        ("a: !!python/object/apply:os.system ['true']\n", "p.yaml:1:4: tags are not allowed"),
        ("version: 2\n", "version 2 is not supported; this program reads version 1"),
        ("objective: speed\n", "'speed' is not one of latency, throughput, prefill"),
        ("gpu_memory: plenty\n", "'plenty' is not a size"),
        ("gpu_memory: -5\n", "is not a size"),
        ("gpu_memory: .nan\n", "nan"),
        ("rules:\n  - match: head\n    gpu: .nan\n", "nan: must be a fraction"),
        ("rules:\n  - match: head\n    gpu: .inf\n", "inf: must be a fraction"),
        ("rules:\n  - match: head\n    gpu: -0.1\n", "-0.1: must be a fraction"),
        ("rules:\n  - match: head\n    gpu: 0.5\n    stream: 0.2\n    cpu: 0.2\n", "must sum to 1, they sum to 0.9"),
        ("rules:\n  - match: head\n    gpu: 0.7\n    cpu: 0.7\n", "more than 1"),
        (
            'rules:\n  - match: head\n    gpu: 0.5\n    tiers: {"1": {stream: 0.1, cpu: 0.1}}\n',
            "in tier 1 must sum to 1",
        ),
        ('rules:\n  - match: head\n    tiers: {"3": {cpu: 1}}\n', "unknown row tier '3'"),
        ("rules:\n  - match: head\n", "sets nothing"),
        ("rules:\n  - gpu: 1\n", "rules[0].match: the key is missing"),
        ("batch: 0\n", "0: must be a whole number >= 1"),
        ("batch: 1\nthreads: 60000\n", "p.yaml:2:1: threads: 60000: must be a whole number from 1 to 4096, or auto"),
        ("staging_slots: 1\n", "1: must be 0 (nothing may stream)"),
        ("context: yes\n", "'yes'"),
        ("[]\n", "a policy is a mapping"),
        ("a: b: c\n", "not valid YAML"),
        ("{a: " * 40, "nested deeper than 32"),
        ("[" * 5000, "nested deeper than 32"),
        ("rules: [" + "1, " * 25_000 + "1]\n", "more than 20000 nodes"),
        ("x: " + "y" * 300_000, "larger than 256 KiB"),
        ("---\nversion: 1\n---\nversion: 1\n", "a second document"),
        ("? [1]\n: 2\n", "a key must be plain text"),
        ("elastic: yes\n", "elastic: 'yes': must be true or false"),
        ("rules: {match: a}\n", "rules: must be a list"),
        ("rules: [5]\n", "rules[0]: 5: must be a mapping of keys"),
        ("rules: [{match: a, tiers: [1]}]\n", "rules[0].tiers: [1]: must be a mapping of keys"),
        ("rules: [{match: 5, gpu: 1}]\n", "rules[0].match: 5: must be text"),
    ],
)
def test_bad_text_is_refused_with_its_reason(text, expected):
    assert any(expected in problem for problem in problems(text)), problems(text)


@given(st.text(alphabet="abc:*&![]{}-#\n\t '\"0.5", max_size=60))
def test_any_text_gives_a_policy_or_a_policy_error(text):
    try:
        assert isinstance(Policy.parse(text), Policy)
    except PolicyError as error:
        assert error.problems


def test_numbers_follow_yaml_1_2():
    assert problems("batch: 010x\n")
    assert 1e6 == Policy.parse("gpu_memory: 1000000\n").gpu_memory
    assert any("'12:30'" in problem for problem in problems("batch: 12:30\n"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, Share("fraction", 0.25)),
        ("25%", Share("fraction", 0.25)),
        (1, Share("fraction", 1.0)),
        ("12 units", Share("units", 12)),
        ("512 features", Share("features", 512)),
        ("auto", None),
    ],
)
def test_shares(value, expected):
    assert expected == parse_share(value)


def test_unknown_name_and_missing_file_are_errors(tmp_path):
    with pytest.raises(PolicyError, match="did you mean 'cpu_only'"):
        Policy.load("cpu_onli")
    with pytest.raises(PolicyError, match="no such policy file"):
        Policy.load(tmp_path / "none.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"objective: \xff\n")
    with pytest.raises(PolicyError, match="not UTF-8"):
        Policy.load(latin)


def test_a_file_names_itself_in_its_problems(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("objective: fast\n", encoding="utf-8")

    with pytest.raises(PolicyError) as error:
        Policy.load(path)

    assert error.value.problems[0].startswith(f"{path}:1:1: objective:")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.*.qkv", "layers.3.qkv", True),
        ("layers.0-2.qkv", "layers.2.qkv", True),
        ("layers.0-2.qkv", "layers.3.qkv", False),
        ("layers.0-2.*", "layers.1.kv", True),
        ("*", "head", True),
        ("layers.1.qkv", "layers.11.qkv", False),
        ("head", "layers.0.head", False),
        ("layers.0-9.*", "head", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert expected is matches(pattern, name)


def test_the_first_matching_rule_decides():
    bounds = bound("rules:\n  - {match: layers.0.qkv, gpu: 1}\n  - {match: layers.*.qkv, cpu: 1}\n")

    assert (2, 0) == (bounds.linears[0].gpu, bounds.linears[4].gpu)


def test_fractions_round_boundaries_so_that_widths_add_up():
    bounds = bound("rules:\n  - {match: head, gpu: 0.34, stream: 0.33, cpu: 0.33}\n")

    limits = bounds.linears[-1]
    assert (5, (6,) * 5, (5,) * 5) == (limits.gpu, limits.stream, limits.cpu)


def test_tiers_share_one_home():
    text = 'rules:\n  - {match: head, gpu: 4 units, tiers: {"1": {cpu: 12 units}, "65+": {stream: 12 units}}}\n'

    limits = bound(text).linears[-1]

    assert (4, 0, 12, None) == (limits.gpu, limits.stream[0], limits.stream[4], limits.stream[2])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{match: layers.9.qkv, gpu: 1}", "matches no shard of tiny; did you mean 'layers.3.qkv'"),
        ("{match: layers.0-9.qkv, gpu: 1}", "matches no shard of tiny"),
        ("{match: head, gpu: 99 units}", "99 units is more than the 16 units it has"),
        ("{match: head, gpu: 17 features}", "the nearest are 16 and 32"),
        ("{match: head, gpu: 10 units, stream: 10 units}", "do not make up its 16 units"),
        ("{match: head, gpu: 1 units, stream: 1 units, cpu: 1 units}", "do not make up its 16 units"),
        ("{match: layers.0.kv, kv: {gpu_heads: 3}}", "3 is more than its 2 KV heads"),
        ("{match: layers.0.kv, kv: {gpu_heads: 1, gpu_tokens: 1}}", "one prefill chunk and a page"),
        ("{match: layers.0.kv, kv: {gpu_heads: 0, gpu_tokens: 64}}", "contradict each other"),
        ("{match: embed, gpu: 1}", "the embedding is always in host memory"),
        ("{match: layers.0.kv, gpu: 1}", "decides nothing"),
    ],
)
def test_rules_that_cannot_be_met_name_place_and_reason(rule, expected):
    found = bind_problems(f"rules:\n  - {rule}\n")

    assert 1 == len(found) and found[0].startswith("p.yaml:2:") and expected in found[0], found


def test_what_all_layers_fail_alike_is_said_once():
    """Forty-eight lines said the same of a model's experts."""
    found = bind_problems("rules:\n  - {match: layers.*.qkv, gpu: 99 units}\n")

    assert len(found) == 1 and "layers.0.qkv and 3 more (rule 'layers.*.qkv'): 99 units is more than" in found[0]


def test_a_rule_hidden_by_an_earlier_one_is_an_error():
    found = bind_problems("rules:\n  - {match: '*', cpu: 1}\n  - {match: head, gpu: 1}\n")

    assert "rules[0] ('*') comes first; put the narrower rule above it" in found[0]


def test_gpu_rules_on_a_cpu_are_an_error():
    assert "device cpu has only the cpu lane" in bind_problems("rules:\n  - {match: head, gpu: 1}\n", "cpu")[0]


def test_a_streaming_rule_without_staging_slots_is_an_error():
    found = bind_problems("staging_slots: 0\nrules:\n  - {match: head, stream: 1}\n")

    assert ("p.yaml:1:1: staging_slots: 0 lets nothing stream, a rule streams head; give 2 or more",) == found


def test_a_tier_that_nothing_else_uses_keeps_its_fixed_widths():
    text = 'rules:\n  - {match: head, tiers: {"2-4": {stream: 8 units}, "5-16": {cpu: 3 units}}}\n'
    plan = make_plan(tiny(), EMULATED, Policy.parse(text), device="emulated", gpu_memory_bytes=240_000)

    assert (8, 3) == (plan.linear("head").cut(1)[1], plan.linear("head").cut(2)[2])
    assert plan.memory.gpu_bytes <= 240_000


def test_user_values_are_hard_constraints():
    text = "rules:\n  - {match: layers.1.down, gpu: 0, cpu: 1}\n  - {match: layers.2.kv, kv: {gpu_heads: 0}}\n"
    plan = make_plan(tiny(), EMULATED, Policy.parse(text), device="emulated", gpu_memory_bytes=2**30)

    assert {plan.linear("layers.1.down").cut(tier) for tier in range(5)} == {(0, 0, 4)}
    assert 0 == plan.kv_placement("layers.2.kv").gpu_kv_heads
    assert 4 == plan.linear("layers.0.down").gpu_units


def test_who_drafts_is_a_word_or_a_model(tmp_path):
    assert Policy.parse("speculate: ngram\n").speculate == "ngram" and Policy().speculate == "off"
    for model in (str(tmp_path), "somebody/small-model"):
        policy = Policy.parse(f'speculate: "{model}"\n')
        assert Policy.parse(policy.to_yaml()).model_dump() == policy.model_dump() and policy.speculate == model
    for wrong in ("banana", "3", "true", "[a, b]", '"' + 5000 * "x" + '"'):
        with pytest.raises(PolicyError, match=r":1:1: speculate: .*off, ngram, auto, or the directory"):
            Policy.parse(f"speculate: {wrong}\n")


def test_diff_names_every_changed_value():
    left, right = Policy.parse("batch: 2\ngpu_memory: 1GiB\n"), Policy.parse("batch: 4\n")

    assert ["batch: 2 -> 4", "gpu_memory: 1.00 GiB -> unset"] == left.diff(right)


def test_schema_lists_every_key():
    schema = policy_schema()

    assert set(schema["properties"]) == set(Policy.model_fields)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(("text", "size"), [("6GiB", 6 * 2**30), ("1.5 GB", 1_500_000_000), ("8k", 8192), (77, 77)])
def test_sizes(text, size):
    assert size == parse_bytes(text)


@pytest.mark.parametrize("text", ["", "GiB", "1 PB", "-1", "0", True, None, "1e9", "6 gib x"])
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_sizes_are_shown_in_binary_units():
    assert ["512 B", "1.50 KiB", "6.00 GiB"] == [format_bytes(size) for size in (512, 1536, 6 * 2**30)]
