"""The timeline of the lanes is valid JSON, its lanes are named, and within a lane spans nest or follow each other."""

import json

import pytest

from hetero_attn.tools.trace import LANES, trace_steps
from tests.support.gpu.fake_engine import fake_engine
from tests.support.models.runtime import cpu_plan, make_engine, run_logits, toy_workload, uniform_plan
from tests.support.models.toy import make_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("toy"), layers=2)


def events_of(engine, file, prompt_tokens: int = 20) -> dict[str, list[dict]]:
    """Spans by lane, read back from the file."""
    trace_steps(engine, prompt_tokens, decode_tokens=2).save(file)
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert tuple(names.values()) == LANES
    spans = {lane: [] for lane in LANES}
    for event in events:
        if event["ph"] == "X":
            spans[names[event["tid"]]].append(event)
    return spans


def check_nesting(spans: list[dict]) -> None:
    """Two spans of one lane are apart, or one holds the other."""
    open_until = []
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        stop = span["ts"] + span["dur"]
        while open_until and open_until[-1] <= span["ts"] + 1e-3:
            open_until.pop()
        assert not open_until or stop <= open_until[-1] + 1e-3
        open_until.append(stop)


def names(spans: list[dict]) -> set[str]:
    return {span["name"].split(" ")[0] for span in spans}


@pytest.mark.parametrize("device", ["emulated", "cuda"])
def test_every_lane_shows_what_it_does(path, tmp_path, device):
    plan = uniform_plan(toy_workload(path), gpu=0.3, stream=0.4, gpu_kv_heads=1)
    if device == "emulated":
        engine = make_engine(path, plan)
        spans = events_of(engine, tmp_path / "trace.json")
        after = run_logits(engine, [1, 2, 3, 4], 2)
        engine.close()
    else:
        with fake_engine(path, plan, handover="graph") as engine:
            spans = events_of(engine, tmp_path / "trace.json")
            after = run_logits(engine, [1, 2, 3, 4], 2)

    for lane in LANES:
        check_nesting(spans[lane])
    assert {"prefill", "decode", "linear", "copy"} <= names(spans["main thread"])
    assert {"linear", "rounded_norm", "rope_append", "copy"} <= names(spans["GPU compute"])
    assert names(spans["copies"]) == {"copy"}
    assert {"linear", "decode_attention"} <= names(spans["CPU lane"])
    assert after.isfinite().all()


@pytest.mark.parametrize("split", [True, False])
def test_events_name_their_shard_and_layer(path, tmp_path, split):
    """They said 605 times "linear"."""
    workload = toy_workload(path)
    engine = make_engine(
        path, uniform_plan(workload, gpu=0.3, stream=0.4, gpu_kv_heads=1) if split else cpu_plan(workload)
    )
    spans = events_of(engine, tmp_path / "trace.json")
    shards = {f"layers.{layer}.{kind}" for layer in range(2) for kind in ("qkv", "o", "gate_up", "down")} | {"head"}
    engine.close()
    lanes = ("GPU compute", "CPU lane") if split else ("CPU lane",)

    linears = set()
    for lane in lanes:
        found = [span["name"].split(" ") for span in spans[lane] if not span["name"].startswith("copy")]
        linears |= {shard for kind, shard in found if kind == "linear"}
        assert all(len(words) == 2 for words in found)
        assert {shard for kind, shard in found if "attention" in kind} == {"layers.0.kv", "layers.1.kv"}
    assert linears == shards
    # Layers follow each other within a step, whatever each operation reads.
    layers = [span["name"].split(".")[1] for span in spans["CPU lane"] if " layers." in span["name"]]
    steps = [layer for layer, before in zip(layers, [None, *layers], strict=False) if layer != before]
    assert steps == ["0", "1"] * (len(steps) // 2)
    if split:
        assert {span["name"].split(" ")[3] for span in spans["copies"]} <= shards


def test_older_keys_and_values_of_a_prompt_are_in_the_trace(path, tmp_path):
    """Copies of blocks took the device behind the trace's back: with no weight streamed, their lane was empty."""
    engine = make_engine(path, uniform_plan(toy_workload(path), gpu=1.0, stream=0.0, gpu_kv_heads=2))
    spans = events_of(engine, tmp_path / "trace.json", prompt_tokens=60)["copies"]
    copied_bytes = engine.lanes.pages.copied_bytes
    engine.close()

    assert names(spans) == {"copy"}
    assert (
        2 * sum(int(span["name"].split(" ")[1]) for span in spans) == copied_bytes
    )  # the steps ran twice, the second time in this trace


def test_the_cpu_alone_has_one_busy_lane(path, tmp_path):
    engine = make_engine(path, cpu_plan(toy_workload(path)))
    spans = events_of(engine, tmp_path / "trace.json")
    engine.close()

    assert names(spans["main thread"]) == {"prefill", "decode"}
    assert {"linear", "prefill_attention", "decode_attention"} <= names(spans["CPU lane"])
    assert spans["copies"] == spans["GPU compute"] == []
