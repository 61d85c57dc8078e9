"""A tokenizer from a GGUF file's metadata, through `tokenizers`: byte-level BPE and SentencePiece vocabularies.

How text is split before the merges is not in the file, only a name for it. A name that is not known here is refused:
the wrong split gives other tokens, and a model that is a little worse for it without anybody noticing.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hetero_attn.checkpoints.gguf.fields import GgufFields
from hetero_attn.errors import UnsupportedModelError, nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"


def _cased(tail: str) -> str:
    """Words by the case of their letters, with what may follow them."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{tail}|{start}{_UPPER}+{_LOWER}*{tail}"


_TEKKEN = _cased("") + rf"|\p{{N}}|{_REST_WITH_SLASH}"
_GPT4O = _cased(f"{_CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"

# Names of tokenizer.ggml.pre: pattern (None: that of GPT-2), whether digits are split off first, whether a whole word
# of the vocabulary needs no merges, whether a text begins with bos where the file does not say.
_PRE = {
    "gpt-2": (None, False, False, False),
    "smollm": (None, True, False, False),
    "llama-bpe": (_LLAMA3, False, True, True),
    "llama3": (_LLAMA3, False, True, True),
    "qwen2": (_QWEN2, False, False, False),
    "tekken": (_TEKKEN, False, True, True),
    "gpt-4o": (_GPT4O, False, False, False),
}

KNOWN_SPLITS = tuple(_PRE)
MOST_SPLIT_CHARACTERS = 1 << 30  # of all ways to split all tokens: a hundred times those of the largest vocabulary


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """backend: of the `tokenizers` package. named: the contents of bos_token and such. chat_template: None for none."""

    backend: "Tokenizer"
    named: dict[str, str]
    chat_template: str | None


def gguf_tokenizer(fields: GgufFields) -> GgufTokenizer:
    """The tokenizer of a file.

    Raises:
        ConfigError: lists that do not belong together. UnsupportedModelError: a kind or a split that is not known.
    """
    kind = fields.text("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise UnsupportedModelError(
            f"{fields.path}: tokenizer model {kind[:40]!r} is not supported{_WAYS_OUT}. Known: {', '.join(_KINDS)}"
        )
    tokens = fields.texts("tokenizer.ggml.tokens")
    if not tokens or len(set(tokens)) != len(tokens):
        fields.fail("tokenizer.ggml.tokens", f"{len(tokens)} tokens, {len(set(tokens))} different", "different tokens")
    tokenizer = _KINDS[kind](fields, tokens)
    _add_special(fields, tokenizer, tokens)
    found = {f"{name}_token": _token(fields, tokens, key) for name, key in _NAMED.items()}
    named = {name: token for name, token in found.items() if token is not None}
    _add_named(tokenizer, named)
    return GgufTokenizer(tokenizer, named, fields.text("tokenizer.chat_template", None))


def _add_named(tokenizer: "Tokenizer", named: dict[str, str]) -> None:
    """Tokens that have a part are special, whatever their type in the file."""
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    new = [token for token in dict.fromkeys(named.values()) if token not in known]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])


_WAYS_OUT = "; put tokenizer.json beside it, give --tokenizer FOLDER, or token ids"
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _token(fields: GgufFields, tokens: list[str], name: str) -> str | None:
    index = fields.integer(f"tokenizer.ggml.{name}_token_id", len(tokens) - 1, None, low=0)
    return None if index is None else tokens[index]


def _byte_level(fields: GgufFields, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

    name = fields.text("tokenizer.ggml.pre", "default")
    if name not in _PRE:
        raise UnsupportedModelError(
            f"{fields.path}: tokenizer.ggml.pre is {name[:40]!r}, no known way to split text"
            f"{nearest(name, _PRE)}{_WAYS_OUT}\nKnown: {', '.join(_PRE)}"
        )
    pattern, splits_digits, ignore_merges, _ = _PRE[name]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(_listed_bpe(fields, vocab, ignore_merges=ignore_merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    steps = [pre_tokenizers.Digits(individual_digits=True)] if splits_digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _listed_bpe(fields: GgufFields, vocab: dict[str, int], **options: Any) -> "BPE":
    """A model of the merges of a file, first those that come first. Which of them is wrong is looked for where one is:
    `tokenizers` looks at them all too, in a fraction of the time, but names neither the file nor the list."""
    from tokenizers.models import BPE

    merges = [tuple(pair.split(" ")) for pair in fields.texts("tokenizer.ggml.merges")]
    try:
        return BPE(vocab=vocab, merges=merges, **options)
    except Exception:
        if wrong := [pair for pair in merges if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys()]:
            fields.fail("tokenizer.ggml.merges", wrong[0], "two tokens whose join is one too")
        raise


def _merged_characters(fields: GgufFields, tokens: list[str]) -> "Tokenizer":
    """That of Gemma 4: a SentencePiece vocabulary whose merges are in the file, and no split but at line ends."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = _token(fields, tokens, "unknown")
    tokenizer = Tokenizer(_listed_bpe(fields, vocab, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _sentencepiece(fields: GgufFields, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = fields.numbers("tokenizer.ggml.scores", len(tokens))
    if scores is None:
        fields.fail("tokenizer.ggml.scores", None, "one score for each token")
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = _token(fields, tokens, "unknown")
    if sum(len(token) ** 2 for token in tokens) > MOST_SPLIT_CHARACTERS:
        fields.fail("tokenizer.ggml.tokens", f"of {sum(map(len, tokens))} characters", "tokens of a few characters")
    merges = _merges(vocab, scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    begins_with_space = fields.boolean("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if begins_with_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if begins_with_space else [])])
    return tokenizer


def _merges(vocab: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Every pair of tokens that joins into one, best score of the joined token first, as SentencePiece merges; of one
    token those of lower ids first. Written flat, because vocabularies have hundreds of thousands."""
    pairs, ids = [], []
    for token, index in vocab.items():
        for at in range(1, len(token)):
            left = vocab.get(token[:at])
            if left is not None and (right := vocab.get(token[at:])) is not None:
                pairs.append((token[:at], token[at:]))
                ids.append((index, left, right))
    joined, left, right = np.array(ids, np.int64).reshape(-1, 3).T
    by_token = np.lexsort((right, left, joined))
    joined = joined[by_token]
    order = np.arange(len(joined)) - np.searchsorted(joined, joined)
    ranked = np.lexsort((joined, order, -scores[joined].astype(np.float64)))
    return [pairs[index] for index in by_token[ranked].tolist()]


def _add_special(fields: GgufFields, tokenizer: "Tokenizer", tokens: list[str]) -> None:
    """Tokens that text never makes (control) or always does (user-defined); what every text begins and ends with."""
    from tokenizers import AddedToken, processors

    types = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    if types is not None:
        special = [tokens[index] for index in (types == CONTROL).nonzero()[0]]
        user = [tokens[index] for index in (types == USER).nonzero()[0]]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])
    pre = fields.text("tokenizer.ggml.pre", "default")
    begins = pre not in _PRE if fields.text("tokenizer.ggml.model") != "gpt2" else _PRE[pre][3]
    edges = []
    for name, default in (("bos", begins), ("eos", False)):
        index = fields.integer(f"tokenizer.ggml.{name}_token_id", len(tokens) - 1, None, low=0)
        if fields.boolean(f"tokenizer.ggml.add_{name}_token", default) and index is not None:
            edges.append((name, tokens[index], index))
    if edges:
        before, after = (" ".join(token for name, token, _ in edges if name == which) for which in ("bos", "eos"))
        single = f"{before} $A {after}".strip()
        pair = f"{before} $A {after} {before} $B {after}".strip()
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(single.split()),
            pair=" ".join(f"{part}:1" if part != "$A" and part != "$B" else part for part in pair.split()),
            special_tokens=[(token, index) for _, token, index in edges],
        )


# By the tokenizer.ggml.model of a file.
_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _merged_characters}
