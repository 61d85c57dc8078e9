"""One peer of a comparison in a process of its own: it loads a model once and is driven by lines. Ours is in ours.py.

    python examples/benchmarks/sides/peers.py SIDE --model PATH --threads N ...

SIDE is llama.cpp, llama-bench or transformers. Reads one JSON request a line from standard input and answers each with
one JSON line on standard output:

    {"test": "decode",  "tokens": 128, "depth": 0}    generate one token after another on top of `depth` tokens
    {"test": "prefill", "tokens": 512, "depth": 0}    compute a prompt
    {"test": "batch",   "tokens": 16, "rows": 8}      16 steps of 8 rows each, from an empty cache
    {"test": "logits",  "token_ids": [1, 2, 3]}       logits after the last of these tokens, to see that sides agree
    {"test": "about"}                                 versions

An answer is {"seconds": of the whole test, "cpu_seconds": of the process meanwhile} and what else the test gives; depth
is filled before the clock starts, by ours with random keys and values, by llama.cpp with copies of a computed piece,
and kept for the next request. Processes of their own, so that thread pools never share cores and a peer may live in
another environment: apart from its own library a peer needs the standard library alone.

What a side does in a decode step: transformers is fed the argmax of the logits; ours takes it too, but is fed the same
random tokens as llama.cpp, as llama-bench does, so that both choose the same experts. A batch is 8 sequences with 8
rows of logits for ours, and 8 tokens of one sequence with logits of the last for llama.cpp (llama-bench's `-p 8
-ub 8`), which is less work.
"""

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

FILL_PIECE = 256  # tokens that llama.cpp computes to fill a depth with copies of them


@dataclass(frozen=True, slots=True)
class Settings:
    """What a side is started with.

    context: tokens of one sequence. rows: most rows of a batch. ubatch, kv, flash_attention, repack, llama_bench: of
    llama.cpp. isa: the instruction set that ours is held to, None for the best of the CPU.
    """

    model: Path
    dtype: str
    threads: int
    context: int
    rows: int
    ubatch: int
    kv: str
    flash_attention: str
    llama_bench: Path | None
    repack: bool = True
    isa: str | None = None


class Side:
    """A loaded model with one sequence that grows and is cut back; subclasses know how."""

    vocab_size: int
    length = 0

    def append(self, token_ids: list[int]) -> None:
        """Compute a prompt on top of the sequence."""
        raise NotImplementedError

    def decode(self, tokens: int) -> None:
        """Generate tokens one after another."""
        raise NotImplementedError

    def rewind(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        raise NotImplementedError

    def batch(self, rows: int, steps: int) -> None:
        """Compute `steps` steps of `rows` rows each from an empty cache."""
        raise ValueError(f"{type(self).__name__} has no batch test; ask hetero-attn or llama.cpp")

    def logits(self, token_ids: list[int]) -> list[float]:
        """Logits after the last of `token_ids`, from an empty cache."""
        raise NotImplementedError

    def about(self) -> dict[str, object]:
        """Versions and facts worth recording."""
        raise NotImplementedError

    def answer(self, request: dict[str, object]) -> dict[str, object]:
        """Run one request."""
        test, tokens, depth = request["test"], request.get("tokens", 0), request.get("depth", 0)
        if test == "about":
            return self.about()
        if test == "logits":
            return {"logits": self.logits(request["token_ids"])}
        self.seek(depth)
        # Made before the clock starts, from one seed on every side.
        prompt = random_tokens(tokens, self.vocab_size) if test == "prefill" else []
        started, cpu_started = time.perf_counter(), time.process_time()
        if test == "decode":
            self.decode(tokens)
        elif test == "prefill":
            self.append(prompt)
        elif test == "batch":
            self.batch(request["rows"], tokens)
        else:
            raise ValueError(f"test is {test!r}; it must be one of decode, prefill, batch, logits, about")
        return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}

    def seek(self, depth: int) -> None:
        """Cut the sequence back, or fill it, to `depth` tokens."""
        if self.length > depth:
            self.rewind(depth)
        if self.length < depth:
            self.fill(depth - self.length)

    def fill(self, tokens: int) -> None:
        """Grow the sequence; what its tokens are does not matter."""
        self.append(random_tokens(tokens, self.vocab_size))


class LlamaCpp(Side):
    """llama.cpp through the C functions of llama-cpp-python; its defaults except where Settings say otherwise."""

    def __init__(self, settings: Settings) -> None:
        import llama_cpp as library

        self._library = library
        self._silence = library.llama_log_callback(lambda level, text, data: None)
        library.llama_log_set(self._silence, ctypes.c_void_p())
        library.llama_backend_init()
        wishes = library.llama_model_default_params()
        wishes.use_extra_bufts = settings.repack
        self._model = library.llama_model_load_from_file(os.fsencode(settings.model), wishes)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {settings.model}")
        params = library.llama_context_default_params()
        params.n_ctx = -(-settings.context // 256) * 256
        params.n_seq_max, params.kv_unified = 2, True  # the second sequence carries copies, see `fill`
        params.n_batch, params.n_ubatch = max(2048, settings.ubatch), settings.ubatch
        params.n_threads = params.n_threads_batch = settings.threads
        params.type_k = params.type_v = {"f16": 1, "bf16": 30}[settings.kv]
        params.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[settings.flash_attention]
        self._context = library.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp cannot make a context of {params.n_ctx} tokens for {settings.model}")
        self._batch = params.n_batch
        self.vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def append(self, token_ids: list[int]) -> None:
        """See Side."""
        for start in range(0, len(token_ids), self._batch):
            self._compute(token_ids[start : start + self._batch])

    def fill(self, tokens: int) -> None:
        """See Side; one piece is computed, its copies are moved to the positions behind it and joined to the
        sequence."""
        library, memory, stop = self._library, self._library.llama_get_memory(self._context), self.length + tokens
        piece = -(-stop // -(-stop // FILL_PIECE))
        self.rewind(0)
        super().fill(piece)
        size = library.llama_state_seq_get_size(self._context, 0)
        state = (ctypes.c_uint8 * size)()
        library.llama_state_seq_get_data(self._context, state, size, 0)
        while self.length < stop:
            if not library.llama_state_seq_set_data(self._context, state, size, 1):
                raise RuntimeError(f"llama.cpp cannot copy a sequence of {piece} tokens to {self.length}")
            library.llama_memory_seq_add(memory, 1, 0, -1, self.length)
            library.llama_memory_seq_cp(memory, 1, 0, 0, -1)
            library.llama_memory_seq_rm(memory, 1, -1, -1)
            self.length += piece
        # What was moved is rotated to its positions by the next computation, which no clock should see.
        self.rewind(stop - 1)
        self._compute([0])

    def decode(self, tokens: int) -> None:
        """See Side."""
        for token_id in random_tokens(tokens, self.vocab_size):
            self._compute([token_id])

    def rewind(self, length: int) -> None:
        """See Side."""
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self._context), 0, length, -1)
        self.length = length

    def batch(self, rows: int, steps: int) -> None:
        """See Side."""
        for _ in range(steps):
            self._compute(random_tokens(rows, self.vocab_size))

    def logits(self, token_ids: list[int]) -> list[float]:
        """See Side."""
        self.seek(0)
        self.append(token_ids)
        return self._library.llama_get_logits_ith(self._context, -1)[: self.vocab_size]

    def about(self) -> dict[str, object]:
        """See Side."""
        features = self._library.llama_print_system_info().decode()
        return {"versions": {"llama-cpp-python": self._library.__version__, "llama.cpp": features.strip()}}

    def _compute(self, token_ids: list[int]) -> None:
        tokens = (self._library.llama_token * len(token_ids))(*token_ids)
        status = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, len(token_ids)))
        if status:
            raise RuntimeError(f"llama_decode of {len(token_ids)} tokens after {self.length} gave {status}")
        self._library.llama_synchronize(self._context)
        self.length += len(token_ids)


class LlamaBench(Side):
    """A llama-bench binary: every request starts it anew, and its own clock leaves loading out."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._build = "unknown"

    def answer(self, request: dict[str, object]) -> dict[str, object]:
        """See Side; a batch is `-p rows -ub rows`, averaged over `tokens` repetitions."""
        test, tokens = request["test"], request.get("tokens", 0)
        if test == "about":
            return self.about()
        if test == "batch" and request["rows"] == 1:
            return {"seconds": self._run(["-p", "0", "-n", tokens])}
        if test == "batch":
            rows = request["rows"]
            return {"seconds": tokens * self._run(["-p", rows, "-n", 0, "-ub", rows, "-r", tokens])}
        if test not in ("decode", "prefill"):
            raise ValueError(f"llama-bench has no {test!r} test; give an interpreter with llama_cpp for it")
        lengths = ["-p", tokens, "-n", 0] if test == "prefill" else ["-p", 0, "-n", tokens]
        return {"seconds": self._run([*lengths, "-d", request.get("depth", 0)])}

    def about(self) -> dict[str, object]:
        """See Side."""
        return {"versions": {"llama-bench": self._build}}

    def _run(self, arguments: list[object]) -> float:
        """Seconds of one repetition."""
        settings, arguments = self._settings, [str(argument) for argument in arguments]
        command = [str(settings.llama_bench), "-m", str(settings.model), "-t", str(settings.threads), "-o", "json"]
        command += ["-ctk", settings.kv, "-ctv", settings.kv]
        command += [] if settings.flash_attention == "auto" else ["-fa", str(int(settings.flash_attention == "on"))]
        command += arguments + ([] if "-ub" in arguments else ["-ub", str(settings.ubatch)])
        run = subprocess.run(
            command + ([] if "-r" in arguments else ["-r", "1"]), capture_output=True, text=True, check=True
        )
        (result,) = json.loads(run.stdout)
        self._build = f"{result.get('build_commit')} ({result.get('build_number')})"
        return result["avg_ns"] / 1e9


class Transformers(Side):
    """transformers in bf16 on the CPU, with its dynamic cache."""

    def __init__(self, settings: Settings) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(settings.threads)
        self._torch, self._transformers = torch, transformers
        self._model = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16).eval()
        self._cache = transformers.DynamicCache(config=self._model.config)
        self.vocab_size = self._model.config.vocab_size

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._cache.get_seq_length()

    def append(self, token_ids: list[int]) -> None:
        """See Side."""
        with self._torch.inference_mode():
            self._last = self._model(
                self._torch.tensor([token_ids]), past_key_values=self._cache, logits_to_keep=1
            ).logits[0, -1]

    def decode(self, tokens: int) -> None:
        """See Side."""
        token_id = 0
        for _ in range(tokens):
            self.append([token_id])
            token_id = int(self._last.argmax())

    def rewind(self, length: int) -> None:
        """See Side."""
        self._cache.crop(length)

    def logits(self, token_ids: list[int]) -> list[float]:
        """See Side."""
        self.seek(0)
        self.append(token_ids)
        return self._last.float().tolist()

    def about(self) -> dict[str, object]:
        """See Side."""
        return {"versions": {"transformers": self._transformers.__version__}}


SIDES = {
    "llama.cpp": LlamaCpp,
    "llama-bench": LlamaBench,
    "transformers": Transformers,
}


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """Token ids, the same ones for the same arguments."""
    source = random.Random(count)
    return [source.randrange(vocab_size) for _ in range(count)]


def serve(side: Side, answers: TextIO) -> None:
    """Answer requests from standard input, one JSON line each, until it ends."""
    for line in sys.stdin:
        print(json.dumps(side.answer(json.loads(line))), file=answers, flush=True)


def main(sides: dict[str, type[Side]]) -> None:
    """Read the command line, load the model of one of `sides`, serve."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("side", choices=sides)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, or GGUF for llama.cpp")
    parser.add_argument("--dtype", default="bf16", help="of our weights")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--ubatch", type=int, default=512, help="tokens that llama.cpp computes at once")
    parser.add_argument("--kv", choices=("f16", "bf16"), default="f16", help="cache dtype of llama.cpp")
    parser.add_argument("--flash-attention", choices=("auto", "on", "off"), default="auto", help="of llama.cpp")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--no-repack", dest="repack", action="store_false", help="llama.cpp keeps weights as they are")
    parser.add_argument("--isa", help="instruction set that ours is held to")
    options = vars(parser.parse_args())
    # Libraries may print: only answers go to the pipe, everything else to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = sides[options.pop("side")](Settings(**options))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    serve(side, answers)


if __name__ == "__main__":
    main(SIDES)
