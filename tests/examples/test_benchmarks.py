"""The benchmark scripts run to their last line without any peer, and the files they make are what they say.

No figure is judged here: a test machine is shared, and the sizes are tiny.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import psutil
import pytest
import torch

from hetero_attn import LLM
from tests.support.processes.quick_python import quick_python
from tests.support.processes.scripts import run_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "benchmarks"


def load(name: str) -> ModuleType:
    """A benchmark script, or a part of one, as a module."""
    with mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]):
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, as the benchmark makes it, in the folder where the benchmark looks for it."""
    script, path = (load("models.random_checkpoint"), tmp_path_factory.mktemp("benchmarks") / "tiny")
    script.write_checkpoint(script.SHAPES["tiny"], path)
    return path


def run(name: str, *arguments: object, lines: str = "") -> subprocess.CompletedProcess[str]:
    """Run a benchmark here."""
    return run_script(SCRIPTS / name, *arguments, lines=lines)


def run_process(name: str, *arguments: object, lines: str = "") -> subprocess.CompletedProcess[str]:
    """Run a benchmark as a reader would, with the packages of this checkout."""
    search_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = quick_python(SCRIPTS / name, *arguments)
    environment = os.environ | {"PYTHONPATH": search_path}
    return subprocess.run(command, env=environment, input=lines, capture_output=True, text=True, check=False)


@pytest.mark.matrix
def test_whole_model_alone_ends_with_a_json_line(checkpoint: Path, tmp_path: Path) -> None:
    rows = ("prefill-bf16", "depth-bf16")
    no_peer = ["--llama-python", tmp_path / "no-such-interpreter", "--peers", "llama.cpp"]
    out = tmp_path / "result.json"
    done = run("whole_model.py", "--quick", "--work-dir", checkpoint.parent, *no_peer, "--out", out, "--rows", *rows)

    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert sorted(row["name"] for row in record["rows"]) == sorted(rows)
    assert all(row["ours"] > 0 and row["peer"] is None for row in record["rows"])
    assert [row["bytes_per_s"] is not None for row in record["rows"]] == [False, True]
    assert record["peers"]["llama.cpp"].startswith("not installed")
    assert done.stdout.index("ceiling: ") < done.stdout.index("prefill-bf16") < done.stdout.index("depth-bf16")


def test_every_kind_of_request_is_answered_by_our_side(checkpoint: Path) -> None:
    requests = [
        {"test": "prefill", "tokens": 20},
        {"test": "decode", "tokens": 2, "depth": 30},
        {"test": "batch", "tokens": 2, "rows": 3},
        {"test": "logits", "token_ids": [1, 2, 3]},
    ]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = run_process("sides/ours.py", "hetero-attn", "--model", checkpoint, "--threads", 2, "--rows", 3, lines=lines)
    assert done.returncode == 0, done.stderr
    ready, *answers = [json.loads(line) for line in done.stdout.splitlines()]

    assert ready == {"ready": True}
    assert all(answer["seconds"] > 0 for answer in answers[:3])
    with LLM(checkpoint, device="cpu", max_context=64, num_threads=2, progress=False) as llm:
        assert torch.allclose(torch.tensor(answers[3]["logits"]), llm.logits([1, 2, 3])[-1], rtol=1e-3, atol=1e-3)


def test_our_side_tells_what_routers_chose_and_what_a_step_of_experts_reads() -> None:
    requests = [{"test": "decode", "tokens": 2, "depth": 0}, {"test": "physics"}, {"test": "routes", "tokens": 40}]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = run_process(
        "sides/ours.py",
        "hetero-attn",
        "--model",
        ROOT / "examples" / "tiny-moe",
        "--threads",
        1,
        "--context",
        64,
        lines=lines,
    )
    assert done.returncode == 0, done.stderr
    _, _, physics, routes = [json.loads(line) for line in done.stdout.splitlines()]

    assert 0 < physics["linears_s"] < physics["reading_s"] < physics["step_s"] and physics["sweep_s"] > 0
    assert (routes["experts"], routes["per_row"], routes["tokens"]) == (32, 4, 40)
    assert 8 < routes["distinct"] <= 32 and 0 < routes["reuse_distance"] < 32
    assert 0 < routes["quarter_held"] < routes["half_held"] < 1


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q8_0", "MXFP4", "BF16"])
def test_random_weights_of_a_file_are_small_numbers_around_nothing(kind: str) -> None:
    import gguf
    import numpy as np

    script = load("models.random_experts")
    raw = script.codes(np.random.default_rng(1), (64, 512), kind)
    numbers = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float64)

    assert numbers.shape == (64, 512)
    assert 0.005 < numbers.std() < 0.08 and abs(numbers.mean()) < 0.03 * numbers.std()


def test_a_random_checkpoint_is_what_safetensors_reads(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    shape = load("models.random_checkpoint").SHAPES["tiny"]
    tensors = load_file(checkpoint / "model.safetensors")

    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shape.tensors()
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    down = tensors["model.layers.1.mlp.down_proj.weight"].float()
    assert down.std().item() == pytest.approx(shape.intermediate_size**-0.5, rel=0.02)
    assert not torch.equal(down, tensors["model.layers.0.mlp.down_proj.weight"].float())


def test_rows_for_adjacent_pairs_rotate_like_halves() -> None:
    """llama.cpp turns features 2i and 2i+1 together where the checkpoint means i and i + head_dim/2."""
    import numpy as np

    script = load("models.random_checkpoint")
    rows = np.arange(2 * 8, dtype=np.uint16).reshape(16, 1)
    config = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}

    moved = script._for_adjacent_pairs("model.layers.0.self_attn.q_proj.weight", rows, config)[:, 0].tolist()

    assert moved == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert script._for_adjacent_pairs("model.layers.0.self_attn.v_proj.weight", rows, config) is rows


def test_a_peer_that_runs_another_model_is_refused() -> None:
    script = load("whole_model")

    class Stub:
        def __init__(self, *logits: float) -> None:
            self.name, self._logits = "stub", logits

        def ask(self, **request: object) -> dict[str, object]:
            return {"logits": list(self._logits)}

    assert script.check_logits(Stub(1.0, 2.0), Stub(1.0, 2.01), "bf16") < 1e-3
    with pytest.raises(RuntimeError, match="do not run the same model"):
        script.check_logits(Stub(1.0, 2.0), Stub(2.0, -1.0), "bf16")


def test_a_row_without_a_target_shows_its_ratio_and_no_verdict() -> None:
    script = load("sides.comparisons")
    depths = {row.depth: row.least for row in script.COMPARISONS if row.name.startswith("depth-")}
    row = script.Result("depth-1k-bf16", "tokens/s", 9.0, 6.0, "peer", 1.5, None, None, (9.0,), (6.0,), 1e9)

    assert depths == {0: None, 1024: None, 4096: None, 16_384: 1.0, 65_536: None}
    assert row.verdict == "-"
    assert row.line().split()[:6] == ["depth-1k-bf16", "9.00", "6.00", "1.50", "-", "-"]


def test_llama_bench_is_asked_in_its_own_words(tmp_path: Path) -> None:
    """A stand-in for the binary: it writes its arguments down and answers as llama-bench does with -o json."""
    binary, seen = tmp_path / "llama-bench", tmp_path / "seen"
    answer = json.dumps([{"avg_ns": 2_000_000_000, "build_commit": "abc", "build_number": 7}])
    binary.write_text(f"#!/bin/sh\necho \"$@\" > '{seen}'\necho '{answer}'\n")
    binary.chmod(0o755)
    peers = load("sides.peers")
    settings = peers.Settings(tmp_path / "m.gguf", "bf16", 3, 512, 8, 512, "f16", "auto", binary)
    side = peers.LlamaBench(settings)

    assert side.answer({"test": "decode", "tokens": 32, "depth": 100}) == {"seconds": 2.0}
    words = seen.read_text().split()
    asked = {flag: words[words.index(flag) + 1] for flag in ("-t", "-p", "-n", "-d", "-r", "-o")}
    assert asked == {"-t": "3", "-p": "0", "-n": "32", "-d": "100", "-r": "1", "-o": "json"}
    assert side.answer({"test": "batch", "tokens": 5, "rows": 8}) == {"seconds": 10.0}
    assert "-ub 8" in seen.read_text()
    assert side.about() == {"versions": {"llama-bench": "abc (7)"}}


def test_growth_ends_with_a_json_line_that_says_what_was_met() -> None:
    done = run("growth.py", "--context", 150, "--parts", "exact")

    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [(row["dtype"], row["is_met"]) for row in record["exact"]] == [("fp32", True), ("bf16", True)]


def test_starts_ends_with_a_json_line_and_says_the_targets_first(tmp_path: Path) -> None:
    out, asked = tmp_path / "starts.json", ["--repetitions", 2, "--parts", "help"]
    done = run("starts.py", ROOT / "examples" / "tiny", *asked, "--out", out)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])

    assert done.stdout.startswith("targets: help 0.3 s\n")
    assert record == json.loads(out.read_text())
    (row,) = record["rows"]
    assert row["name"] == "help" and len(row["runs"]) == 2
    assert all(0 < run["cpu_s"] and 0 < run["wall_s"] and run["load"] >= 0 for run in row["runs"])


@pytest.mark.matrix
def test_the_gpu_script_runs_the_parts_that_are_asked_for_and_reports_them(tmp_path: Path) -> None:
    """A measurement of the hand-over that an emulated GPU cannot take, and those of one plan of a model."""
    arguments = ("--device", "emulated", "--quick", "--work-dir", tmp_path, "--out", tmp_path / "out")
    asked = ("sanity hop graph", "model tiny q4 75% auto")

    done = run("gpu_offload.py", *arguments, "--minutes", 60, "--only", asked[0], "--only", asked[1])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    parts = {line["name"]: line for line in lines if line["name"].startswith(("sanity", "model", "probe", "kernels"))}
    assert all(name.startswith(asked) for name in parts)
    assert "NotImplementedError" in parts[asked[0]]["error"]
    assert all(parts[f"{asked[1]}: {row}"]["tokens_per_s"] > 0 for row in ("decode", "pp16", "pp64"))

    report = run("gpu_report.py", tmp_path / "out", tmp_path / "record.json", "--plot", tmp_path / "plot.png")
    assert report.returncode == 0, report.stderr
    assert "| tiny q4 75% auto: pp16 |" in report.stdout and (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.matrix
def test_the_gpu_script_runs_every_part_on_the_emulated_device_and_keeps_what_it_has(tmp_path: Path) -> None:
    """A run without time, one with, and one that asks for parts which are done: it repeats nothing."""
    arguments = ("--device", "emulated", "--quick", "--work-dir", tmp_path, "--out", tmp_path / "out")
    results = tmp_path / "out" / "results.jsonl"

    def lines() -> list[dict[str, object]]:
        return [json.loads(line) for line in results.read_text().splitlines()]

    assert run("gpu_offload.py", *arguments, "--minutes", 0).returncode == 0
    skipped = {line["name"] for line in lines() if "0 s are left" in str(line.get("skipped"))}
    assert {"sanity kernels", "rates", "model tiny q4 25% prompts"} <= skipped
    done = run("gpu_offload.py", *arguments, "--minutes", 60)
    assert done.returncode == 0, done.stderr
    first = lines()
    failed = {line["name"]: line["error"] for line in first if "error" in line}
    found = {line["name"]: line for line in first if "skipped" not in line}

    # An emulated GPU runs its work at once and captures none.
    assert set(failed) == {"sanity hop graph", "sanity hop graph busy"}
    assert first[-1]["reason"] == "no part is left"
    assert skipped - set(found) == {"sanity full queue", "kernels linear stages", "probe full queue by events"}
    for row in ("decode", "pp16", "pp64"):
        assert found[f"model tiny q4 75% auto: {row}"]["tokens_per_s"] > 0
    trace = found["model tiny q4 75% prompts"]["trace"]
    assert json.loads((tmp_path / "out" / trace["file"]).read_text())["traceEvents"]
    assert trace["spans"]["GPU compute: linear"][0] > 0

    report = run("gpu_report.py", tmp_path / "out", tmp_path / "record.json", "--plot", tmp_path / "plot.png")
    assert report.returncode == 0, report.stderr
    assert "| tiny q4 50% auto: pp16 |" in report.stdout and (tmp_path / "plot.png").stat().st_size > 0
    assert "- sanity hop graph: NotImplementedError" in report.stdout
    assert "sanity hop flags" in {result["name"] for result in json.loads((tmp_path / "record.json").read_text())}

    assert run_process("gpu_offload.py", *arguments, "--only", "model", "--skip", "model tiny q4 2").returncode == 0
    assert [line["name"] for line in lines()[len(first) :]] == ["start", "machine", "end"]


def gpu_run(tmp_path: Path, **options: object) -> object:
    """A run of the GPU script, as on a GPU machine."""
    return load("gpu.run").Run(tmp_path, tmp_path, "cuda", False, 2e12, None, **options)


def test_the_gpu_script_has_its_headlines_within_five_minutes(tmp_path: Path) -> None:
    run = gpu_run(tmp_path)
    parts = list(load("gpu.parts").parts(run))
    names = [part.name for part in parts]
    last = names.index("model 8b q4 25% prompts")

    assert len(set(names)) == len(names)
    assert sum(part.seconds for part in parts[:last]) + parts[last].seconds <= 300
    assert names[-1].startswith("probe") and names.index("tests") > last
    begun = tuple(names)
    for expected in load("gpu.expectations").EXPECTATIONS:
        assert expected.name.partition(": ")[0] in begun, expected
        assert expected.low <= expected.high and expected.decide


def test_parts_are_chosen_by_the_beginnings_of_their_names(tmp_path: Path) -> None:
    run = gpu_run(tmp_path, only=("model", "rates"), skip=("model 8b q4 50%",))

    assert [run.wants(name) for name in ("rates", "model 8b q4 25%", "model 8b q4 50% auto", "tests")] == [1, 1, 0, 0]


def test_a_plan_without_measured_rates_has_the_recorded_machines_true_ones(tmp_path: Path) -> None:
    run = gpu_run(tmp_path)
    rates = load("gpu.rates")
    recorded, profile = rates.recorded_profile(), rates.planning_profile(run)

    assert profile.dram_bytes_per_s == 156e9 and profile.h2d_bytes_per_s == 50e9
    assert profile.cpu_linear_bytes_per_s.q4 == 130e9
    assert profile.cpu_linear_bytes_per_s.bf16 == recorded.cpu_linear_bytes_per_s.bf16
    slower = [row.ops_per_s.q4 / old.ops_per_s.q4 for row, old in zip(profile.cpu_rows, recorded.cpu_rows, strict=True)]
    assert slower[0] == pytest.approx(130e9 / recorded.cpu_linear_bytes_per_s.q4)
    assert slower[-1] == 1 and all(share <= 1 for share in slower)
    (tmp_path / rates.PROFILE_FILE).write_text(recorded.to_json())
    assert rates.planning_profile(run) == recorded


def test_a_checkpoint_that_another_process_writes_is_waited_for(tmp_path: Path) -> None:
    """Both ask at once: one writes it, and what both then see is whole."""
    wishes = ("--checkpoint", "tiny", "--out", tmp_path, "--work-dir", tmp_path)
    command = quick_python(SCRIPTS / "gpu_offload.py", *wishes)
    other = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    directory = load("gpu.checkpoints").made_checkpoint(tmp_path, "tiny")
    written = (directory / "model.safetensors").stat()

    assert other.wait(60) == 0
    assert (directory / "model.safetensors").stat() == written
    assert not list(directory.glob("*.partial"))


def test_a_paced_device_keeps_the_rates_it_was_given() -> None:
    """Queues are clocks: kernels and copies overlap, events order them, and waiting lasts until the work would have
    ended."""
    from hetero_attn.devices import EmulatedDriver
    from placement import HardwareProfile

    driver = load("simulated.paced_driver").PacedDriver(HardwareProfile.named("emulated"))
    compute, copies = driver.stream("compute"), driver.stream("copies")
    now = compute.ready_at = copies.ready_at = 1e12

    driver.copy(torch.empty(12_000_000, dtype=torch.uint8), torch.empty(12_000_000, dtype=torch.uint8), copies)
    driver.ops.linear(torch.empty(1, 64), torch.empty(250_000, 1000, dtype=torch.uint8), "q4", None, None)
    times = [compute.ready_at - now, copies.ready_at - now]
    driver.wait(compute, driver.record(copies))

    assert times == pytest.approx([1e-3, 1e-3], rel=0.3)
    assert compute.ready_at >= copies.ready_at
    public = {name for name in dir(EmulatedDriver) if not name.startswith("_")}
    assert public - {"ops"} <= {name for name in dir(driver) if not name.startswith("_")}


def test_prediction_rows_cover_what_the_table_promises() -> None:
    script = load("prediction")

    assert len(script.ROWS) >= 12 and len({row.name for row in script.ROWS}) == len(script.ROWS)
    assert {row.dtype for row in script.ROWS} == {"fp32", "bf16", "q8", "q4"}
    assert {row.budget is None for row in script.ROWS} == {True, False}
    figures = [
        {"phase": phase, "prediction_error": error} for phase in ("decode", "prefill") for error in (-0.3, 0.1, 0.2)
    ]
    assert script.medians(figures) == {"decode": 0.2, "prefill": 0.2}
    assert script.middle([{"prediction_error": error} for error in (0.4, -0.1, 0.1)]) == {"prediction_error": 0.1}


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    running = tmp_path / "running.json"
    running.write_text('{"name": "a part", "limit_s": 0.1}')
    script = "sleep 60 & echo $!; wait"
    child = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    grandchild = psutil.Process(int(child.stdout.readline()))

    fault = load("gpu_offload")._await(child, running, 2e12)

    assert fault == "took longer than 0.1 s, or than all parts may, and was ended"
    assert child.returncode == -signal.SIGKILL
    psutil.wait_procs([grandchild], timeout=10)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    child.stdout.close()


def test_a_layer_of_a_prompt_queues_few_launches() -> None:
    """A dequantisation for each piece of a weight, and six others: norms and the activation round what they give."""
    pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")
    done = run("simulated/launches.py", "--repetitions", 1, "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, last = found["first chunk"], found["last chunk"]
    pieces = 4 + found["streamed_pieces"]
    small = ("rounded_norm", "rope_append", "prefill_attention", "rounded", "rounded_gated")
    assert [first[op]["launches"] for op in small] == [2, 1, 1, 1, 1]
    assert (first["linear"]["launches"], first["launches"]) == (pieces, pieces + 6)
    assert (last["linear"]["launches"], last["rounded"]["launches"]) == (pieces, 1)
    assert 1 <= last["merge"]["launches"] == last["prefill_attention"]["launches"] - 1 <= 5  # blocks of a whole chunk


def test_speculation_checks_every_answer_and_prints_a_gain_for_each_kind() -> None:
    few = ["--tokens", 12, "--repetitions", 1, "--threads", 1, "--dtype", "q8"]
    tiny = ROOT / "examples" / "tiny"
    few += ["--texts", "repeats", "prose", "--drafts", "ngram", "oracle:1", "--twin", tiny, "--json"]
    done = run("speculation.py", *few)

    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    rows = record["rows"]
    assert [row["drafts"] for row in rows] == ["plain", "ngram", "oracle:1", "twin", "plain", "ngram", "oracle:1"]
    assert all(row["gain"] > 0 and row["same_tokens"] for row in rows) and rows[0]["acceptance"] is None
    assert rows[2]["acceptance"] == rows[6]["acceptance"] == 1.0
    assert [each["rows"] for each in record["passes"]] == [1, 2, 3, 4, 5, 6, 7, 8, 16]
    for row in rows:  # every token of an answer was made by some pass
        assert sum(row["passes"].values()) <= 11 and set(row["passes"]) <= {str(count) for count in range(1, 17)}
