"""Experts of `gpu_offload.py`: Qwen3-30B-A3B's layers, with copies of a quarter of the experts on the GPU and without.

Weights are random (`models/random_experts.py`), so routes follow no text: greedy tokens of a random model come round
soon, and with them their experts. The share of picks that was found in a slot stands beside every speed, with what the
plan expected.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .models import QUICK_CONTEXT, decode, prompt
from .rates import planning_profile
from .run import Run

BENCHMARKS = Path(__file__).resolve().parents[1]
SHAPE, TYPE, LAYERS = "s1", "Q4_0", 8
EXPERTS, QUICK_EXPERTS = 128, 32
QUICK_MODEL = BENCHMARKS.parent / "tiny-moe"  # trained, 10 MB
DENSE_ON_GPU = """
rules:
  - {match: "*.experts", gpu: 0.0, expert_slots: SLOTS}
  - {match: "*.kv", kv: {gpu_heads: all}}
  - {match: "*", gpu: 1.0, stream: 0.0, cpu: 0.0}
"""


def experts(slots_share: float) -> Callable[[Run], dict[str, Any]]:
    """All but the experts on the GPU, and copies of `slots_share` of them: decode at context 1k and a prompt of 512."""

    def measure(run: Run) -> dict[str, Any]:
        started, path = time.monotonic(), expert_file(run)
        written = time.monotonic()
        with _load(run, path, round(slots_share * (QUICK_EXPERTS if run.quick else EXPERTS))) as llm:
            loaded = time.monotonic()
            found = {"file_s": written - started, "load_s": loaded - written, "plan": llm.plan.table()}
            found["decode"] = decode(run, llm)
            found["slots"] = _slots(llm)
            found["pp512"] = prompt(run, llm, 16 if run.quick else 512)
            return found

    return measure


def expert_file(run: Run) -> Path:
    """The GGUF file, written on first use; a small model where no figure counts."""
    path = run.work_dir / f"{SHAPE}-{TYPE}.gguf"
    if run.quick:
        return QUICK_MODEL
    if not path.exists():
        command = [sys.executable, BENCHMARKS / "models/random_experts.py", SHAPE, TYPE, path, "--layers", LAYERS]
        subprocess.run([str(part) for part in command], check=True)
    return path


def _load(run: Run, path: Path, slots: int) -> Any:
    from hetero_attn import LLM
    from placement import Policy

    policy = Policy.parse(DENSE_ON_GPU.replace("SLOTS", str(slots)), "experts")
    return LLM(
        path,
        policy=policy,
        gpu_memory=(8 << 30) if run.has_gpu else (1 << 30),
        dtype="q4" if run.quick else "auto",
        device=run.device,
        max_context=QUICK_CONTEXT if run.quick else 2048,
        max_batch=1,
        hardware=planning_profile(run),
        progress=False,
    )


def _slots(llm: Any) -> dict[str, Any]:
    """Picks, the share of them that slots answered, and experts copied into slots, over everything computed so far."""
    counts = llm.engine.report.experts
    return {"picks": counts.picks, "hit_share": counts.hits / max(1, counts.picks), "inserts": counts.inserts}
