"""Token ids that llama.cpp gives for texts, kept with as much of a model's vocabulary as these texts can touch.

    python -m tests.support.processes.llama_cpp_tokens --llama-python PYTHON_WITH_LLAMA_CPP FILE.gguf ...

writes llama_cpp_tokens.json beside this file. Of the vocabulary stay the tokens that occur in a text, wherever it is
split, and those that are no text; of the merges those that make such a token. No other can take part in these texts, so
the small vocabulary gives the ids of the whole one, by any way to split and to merge.
"""

import argparse
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from hetero_attn.checkpoints.gguf.checkpoint import GgufCheckpoint
from hetero_attn.checkpoints.gguf.fields import GgufFields
from hetero_attn.checkpoints.gguf.tokenizer import BYTE, NORMAL

KEPT = Path(__file__).with_suffix(".json")
LISTS = ("tokens", "scores", "token_type", "merges")
ASK = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(text.encode(), add_bos=True, special=True) for text in json.load(sys.stdin)]))
"""
TEXTS = (
    "Hello, world!",
    "  two in front, two behind  ",
    "one\ntwo\n\nthree\n\n\n  four\t\tfive \r\n six",
    "It's what they'll say, I'D say: we've DON'T can't 'tis o'clock",
    "123 4567 89.01 1,000,000 3.14159 0x1F 2^10 1e-9 v2.0.1",
    "naïve café résumé Ünïcödé Straße ÅNGSTRÖM ﬁne",
    "e\u0301 is not \u00e9, A\u030a is not \u00c5",
    "Привет, как дела? Ёлка",
    "γνῶθι σεαυτόν",
    "שלום עולם",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界！今天天气怎么样？",
    "こんにちは、カタカナ、漢字。",
    "안녕하세요 세계",
    "🙂👍🏽👨‍👩‍👧‍👦🇩🇪 ok",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    'if (a[i] != b->c && !d) { printf("%d\\n", i++); }',
    "<div class='x'>&nbsp;</div> <!-- a -->",
    "https://example.com/a_b?c=d&e=%20#f user@example.org",
    "|---|:-:| **bold** _it_ `code` ~~~ === +++ --- ...",
    "SELECT * FROM t WHERE a >= 1 AND b LIKE '%x%';",
    "CamelCase snake_case kebab-case SCREAMING_CASE mixed123Numbers",
    "a" * 40 + " " + "ha" * 15 + "!" * 9,
    " " * 17 + "x" + " " * 5 + "\n" + " " * 3,
    "\u00a0nbsp\u2003em\u200bzero\u2028line\ufeffbom",
    "\x00\x01\x7f controls \x1b[0m",
    "½ ² ③ Ⅷ ٣ 𝟘 𝒜",
    "$5.00 €20 £3 ¥100 50% 1st 2nd",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "before<|im_end|>after <|im_end|> end <|endoftext|>",
    "<bos><eos><pad> <unk> <s></s>",
    "▁ the sign itself ▁▁ and Ġ Ċ",
    "",
    " ",
    "\n",
    "x",
)


def mixed_lines(count: int, seed: int) -> list[str]:
    """Texts drawn from pieces of TEXTS."""
    draw = random.Random(seed)
    pieces = [text[at : at + 7] for text in TEXTS for at in range(0, len(text), 7)] + [" ", "  ", "\n", "1", "'s"]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(count)]


def ids_of_llama_cpp(python: str, file: Path, texts: list[str]) -> list[list[int]]:
    """What llama.cpp makes of every text, with the tokens that texts begin with; python: one that has llama_cpp."""
    command = [python, "-c", ASK, str(file)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def small_vocabulary(fields: GgufFields, texts: list[str]) -> dict[str, Any]:
    """The metadata of a tokenizer with the tokens that texts can touch; their ids in the whole one under "ids"."""
    values = {key: value for key, value in fields.values.items() if key.startswith("tokenizer.ggml.")}
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    touched = _pieces(texts, values["tokenizer.ggml.model"] == "gpt2", max(map(len, tokens)))
    special = "".join(texts)
    ids = [
        index
        for index, token in enumerate(tokens)
        if token in touched or types[index] == BYTE or (types[index] != NORMAL and token in special)
    ]
    named = {value for key, value in values.items() if key.endswith("_token_id")}
    ids = sorted({*ids, *named})
    kept = {tokens[index] for index in ids}
    found: dict[str, Any] = {"ids": ids, "tokens": [tokens[index] for index in ids]}
    found["token_type"] = [int(types[index]) for index in ids]
    if "tokenizer.ggml.scores" in values:
        found["scores"] = [float(values["tokenizer.ggml.scores"][index]) for index in ids]
    if "tokenizer.ggml.merges" in values:
        pairs = (pair.split(" ") for pair in values["tokenizer.ggml.merges"])
        found["merges"] = [" ".join(pair) for pair in pairs if {*pair, "".join(pair)} <= kept]
    for key, value in values.items():
        name = key.removeprefix("tokenizer.ggml.")
        if name.endswith("_token_id"):
            found[name] = ids.index(value)
        elif name not in LISTS and isinstance(value, str | bool):
            found[name] = value
    return found


def _pieces(texts: list[str], are_bytes: bool, longest: int) -> set[str]:
    """Every run of signs of the texts, as the vocabulary spells them."""
    from tokenizers import pre_tokenizers

    found = set()
    for text in texts:
        if are_bytes:
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            spelled = "".join(part for part, _ in byte_level.pre_tokenize_str(text))
        else:
            spelled = "▁" + text.replace(" ", "▁")
        for start in range(len(spelled)):
            found |= {spelled[start:stop] for stop in range(start + 1, min(len(spelled), start + longest) + 1)}
    return found


def fields_of(kept: dict[str, Any], path: Path) -> GgufFields:
    """The metadata that `small_vocabulary` described."""
    arrays = {"token_type": np.int32, "scores": np.float32}
    values = {
        f"tokenizer.ggml.{name}": np.array(value, arrays[name]) if name in arrays else value
        for name, value in kept.items()
        if name != "ids"
    }
    return GgufFields(path, values | {"general.architecture": "llama"})


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    texts = [*TEXTS, *mixed_lines(60, seed=1)]
    found = {}
    for file in options.files:
        with GgufCheckpoint.open(file) as source:
            small = small_vocabulary(source.fields, texts)
        found[file.stem] = {"vocabulary": small, "ids": ids_of_llama_cpp(options.llama_python, file, texts)}
    KEPT.write_text(json.dumps({"texts": texts, "models": found}, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
