"""Model files changed at random, opened as far as a plan needs them: run as a program, so that a crash is seen.

    python -m tests.support.processes.mutations FOLDER KIND SEED COUNT

FOLDER holds models by kind: KIND/NAME is a directory of safetensors or has a model.gguf. Each round changes header or
metadata of one of them. Prints JSON: how many were refused, by which errors, how many were sound, the most CPU seconds
that one took, and by how much the process grew.

Seconds are those of the machine where their limit was set: a file that is near the limit is opened again, and the least
of its times is divided by how many times longer work of a known size takes just then. A hang stays one, while a slow
or busy processor makes none.
"""

import copy
import json
import random
import re
import shutil
import struct
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.tokenizer import gguf_tokenizer
from hetero_attn.checkpoints.sources import open_source, read_config, stored_formats
from hetero_attn.errors import MOST_CHARACTERS, HeteroError
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.workload import Sizes, build_workload

KINDS = ("gguf", "safetensors", "config")
MOST_SECONDS, TRIES = 1.0, 3
KNOWN_WORK_S = 0.009  # CPU seconds of `known_work` on the machine where the limit was set, Zen 4
MOST_SHOWN = 10 * MOST_CHARACTERS  # of a line, every character escaped
LENGTHS = (0, 1, 255, 1 << 16, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
WORDS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"9", b"-", b"\\u0000", b"\xff", b"\0", b"null", b"1e999", b"9" * 50)
STRANGE = (
    *(None, True, False, -1, 0, 1, 3, 1 << 31, 1 << 62, 10**40, 0.5, 1e-320, 1e308, float("nan"), float("inf")),
    *("", "x", "0" * 5000, "\u202e\x1b[2J", [], [0], [[]], [1] * 2000, ["a"] * 64, {}, {"a": {"a": {}}}),
)


def changed_bytes(content: bytes, header_bytes: int, draw: random.Random) -> bytes:
    """The file with one to five changes of its header: a bit, a length, a byte, a word, a run moved, its end cut."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, how = draw.randrange(max(1, min(header_bytes, len(data)))), draw.randrange(6)
        if how == 0:
            data[at : at + 1] = bytes([data[at] ^ 1 << draw.randrange(8)]) if at < len(data) else b""
        elif how == 1:
            data[at : at + 8] = struct.pack("<Q", draw.choice((*LENGTHS, draw.getrandbits(64), len(data))))
        elif how == 2:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif how == 3:
            word = draw.choice(WORDS)
            data[at : at + draw.choice((0, len(word)))] = word
        elif how == 4:
            start = draw.randrange(header_bytes)
            data[at : at + 20] = data[start : start + draw.choice((0, 20, 40))]
        elif draw.random() < 0.2:
            del data[draw.randrange(len(data) + 1) :]
    return bytes(data)


def changed_json(content: bytes, draw: random.Random) -> bytes:
    """The same object with one to three values somewhere in it replaced, renamed or taken away."""
    values = json.loads(content)
    for _ in range(draw.choice([1, 1, 1, 3])):
        inside: Any = values
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(inside[key], dict | list) and inside[key] and draw.random() < 0.8:
                inside = inside[key]
                continue
            if draw.random() < 0.2:
                del inside[key]
            elif draw.random() < 0.1 and isinstance(inside, dict):
                inside[key + "s"] = inside.pop(key)
            else:
                inside[key] = copy.deepcopy(draw.choice(STRANGE))
            break
    return json.dumps(values).encode()


def header_bytes(path: Path) -> int:
    """Bytes in front of the data of a file."""
    if path.suffix == ".gguf":
        with GgufCheckpoint.open(path) as source:
            return min(entry.offset for entry in source._theirs.values())
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0] if path.suffix == ".safetensors" else path.stat().st_size


def open_whole(path: Path) -> None:
    """All that a plan and a tokenizer need of a model; raises as these do."""
    config = read_config(path)
    with open_source(path) as source:
        source.check(decoder(config))
        if isinstance(source, GgufCheckpoint):
            gguf_tokenizer(source.fields)
    formats = stored_formats(path, config)
    build_workload(
        decoder(config, formats), formats, "m", Sizes(max_context=64, max_batch=2, page_size=16, prefill_chunk=16)
    )


def memory_kib(name: str) -> int:
    """VmRSS or VmHWM of this process."""
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])


def known_work() -> None:
    """What opening a file is made of: parsing, dictionaries and pattern matching."""
    numbers = json.loads(json.dumps({str(number): [number] for number in range(10_000)}))
    assert len(re.findall("[0-9]+", " ".join(numbers))) == len(numbers)


def least_seconds(work: Callable[[], None]) -> float:
    """CPU seconds of this thread that a work takes at best, whatever else the machine does."""
    times = []
    for _ in range(TRIES):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


def machine_seconds(path: Path) -> float:
    """Seconds that opening a model takes on the machine where the limit was set; errors of ours are swallowed."""

    def opened() -> None:
        with suppress(HeteroError):
            open_whole(path)

    return least_seconds(opened) / max(1.0, least_seconds(known_work) / KNOWN_WORK_S)


def targets(model: Path, kind: str) -> list[Path]:
    """The files of a model that a kind of mutation changes."""
    if kind == "config":
        return [path for path in model.glob("*config.json") if path.name != "tokenizer_config.json"]
    if kind == "gguf":
        return [model / "model.gguf"]
    return [*model.glob("*.safetensors"), *model.glob("*.index.json")]


def mutate(folder: Path, kind: str, seed: int, count: int) -> dict[str, Any]:
    """Change models `count` times and open them; see the module's text for what is returned."""
    draw, models = random.Random(f"{kind} {seed}"), sorted((folder / kind).iterdir())
    work = folder / f"work-{kind}-{seed}"
    shutil.copytree(folder / kind, work)
    files = {path: (path.read_bytes(), header_bytes(path)) for model in models for path in targets(model, kind)}
    for model in models:
        open_whole(model / "model.gguf" if kind == "gguf" else model)
    before, errors, sound, slowest = memory_kib("VmHWM"), Counter(), 0, 0.0
    for number in range(count):
        path = draw.choice(list(files))
        content, size = files[path]
        structural = path.suffix == ".json" and draw.random() < 0.7
        changed = changed_json(content, draw) if structural else changed_bytes(content, size, draw)
        target = work / path.relative_to(folder / kind)
        target.write_bytes(changed)
        opened = target if kind == "gguf" else target.parent
        began = time.thread_time()
        try:
            open_whole(opened)
            sound += 1
        except HeteroError as error:
            errors[type(error).__name__] += 1
            is_fit = all(line.isprintable() and len(line) < MOST_SHOWN for line in str(error).split("\n"))
            assert is_fit, f"mutation {number}: {error!r}"
        except BaseException:
            shutil.copy(target, folder / f"failed-{kind}-{seed}-{number}{target.suffix}")
            print(f"mutation {number} of {kind} {seed}, {path}", file=sys.stderr)
            raise
        took = time.thread_time() - began
        if took > MOST_SECONDS / 2:
            took = machine_seconds(opened)
        slowest = max(slowest, took)
        if took > MOST_SECONDS:
            print(f"mutation {number} of {kind} {seed}, {path}: {took:.1f} s", file=sys.stderr)
            shutil.copy(target, folder / f"slow-{kind}-{seed}-{number}{target.suffix}")
        target.write_bytes(content)
    grown = (memory_kib("VmHWM") - before) * 1024
    largest = max(len(content) for content, _ in files.values())
    shutil.rmtree(work)
    return {"sound": sound, "refused": dict(errors), "slowest_s": slowest, "grown_bytes": grown, "largest": largest}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, kind, seed, count = sys.argv[1:]
    print(json.dumps(mutate(Path(folder), kind, int(seed), int(count))))
