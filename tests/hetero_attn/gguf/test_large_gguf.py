"""A plan of a model of 40 GB reads its headers only: the file here is all holes but those."""

import numpy as np
import pytest

from cpu_kernels.formats import GGUF_TYPES
from hetero_attn.checkpoints.gguf.writer import NewTensor, _header
from hetero_attn.checkpoints.raw_file import RawFile
from hetero_attn.planning.settle import plan_model

LAYERS, HIDDEN, WIDTH, KV, VOCAB = 80, 8192, 28672, 1024, 128256
MOST_READ_BYTES = 64 << 20
Q4_K, Q6_K, F32 = (next(item for item in GGUF_TYPES.values() if item.name == name) for name in ("Q4_K", "Q6_K", "F32"))


def tensors() -> list[NewTensor]:
    """Those of Llama 3 70B as Q4_K_M."""
    found = [NewTensor("token_embd.weight", Q4_K, (VOCAB, HIDDEN)), NewTensor("output.weight", Q6_K, (VOCAB, HIDDEN))]
    found.append(NewTensor("output_norm.weight", F32, (HIDDEN,)))
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (KV, HIDDEN),
        "attn_v": (KV, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
    }
    shapes |= {"ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH)}
    for layer in range(LAYERS):
        found += [NewTensor(f"blk.{layer}.{name}_norm.weight", F32, (HIDDEN,)) for name in ("attn", "ffn")]
        for name, shape in shapes.items():
            kind = Q6_K if name in ("attn_v", "ffn_down") and layer % 2 else Q4_K
            found.append(NewTensor(f"blk.{layer}.{name}.weight", kind, shape))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": 64,
        "llama.attention.head_count_kv": 8,
        "llama.context_length": 8192,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": [f"token{index}" for index in range(VOCAB)],
        "tokenizer.ggml.token_type": np.ones(VOCAB, np.int32),
    }
    wanted, path = tensors(), tmp_path_factory.mktemp("large") / "m.gguf"
    header = _header(metadata, wanted)
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(len(header) + sum(tensor.nbytes for tensor in wanted))  # every size is whole lines
    return path


def test_a_plan_of_40_gb_reads_headers_only(model, monkeypatch):
    read = []
    original = RawFile.read_into

    def counted(self, buffer, offset):
        read.append(len(buffer))
        original(self, buffer, offset)

    monkeypatch.setattr(RawFile, "read_into", counted)
    plan = plan_model(model, device="emulated", gpu_memory="8GiB", max_context=4096)

    assert model.stat().st_size > 40e9
    assert plan.workload.weight_bytes + plan.workload.embed_bytes == pytest.approx(model.stat().st_size, rel=0.03)
    assert sum(read) < MOST_READ_BYTES
