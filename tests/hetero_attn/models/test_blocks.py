"""Two kinds of blocks that no family has, each declared here and nowhere else, run, planned, chunked and batched.

    Mixer   residual += out(in(norm(residual)))                    no cache: two linears that the lanes cut
    Decay   s_t = 0.9 s_(t-1) + norm(residual_t); residual += out(s)   a state of fixed size for each sequence

The oracle computes the same models token by token in plain torch, from the checkpoint's own tensors.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.engine.build import build_engine
from hetero_attn.errors import CheckpointError
from hetero_attn.models.block import Block, Norm, normalize
from hetero_attn.models.decoder import decoder
from hetero_attn.ops.linear import SplitInput, linear, linear_add
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.blocks import BufferSet, FixedState, Vector
from hetero_attn.spec.buffers import ActivationWidths, widest_sets
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.weights import BLOCK_FEATURES, LinearSpec, Part
from hetero_attn.spec.workload import Sizes, build_workload
from placement import HardwareProfile, Policy, make_plan
from tests.support.models.runtime import THREADS, batch_and_again, cpu_plan, nmse, run_logits, uniform_plan
from tests.support.models.toy import hf_model, make_checkpoint

HIDDEN, MIXED, EPS, KEPT = 72, 208, 1e-6, 0.9
SHAPE = {"layers": 4, "hidden": HIDDEN, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "intermediate": 192}
TOY_LAYERS = (1, 3)  # the others are a decoder's own
TOKENS = torch.randint(307, (50,), generator=torch.Generator().manual_seed(2)).tolist()


def toy_linear(kind: str, layer: int, in_features: int, out_features: int) -> LinearSpec:
    part = Part(f"toy.{layer}.{kind}.weight", BLOCK_FEATURES, out_features, "fp32")
    return LinearSpec(f"layers.{layer}.{kind}", kind, layer, in_features, (part,), False, block="toy")


class Mixer(Block):
    """A block without a cache."""

    kind, small_calls = "mixer", 1

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.linears = (
            toy_linear("mix_in", layer, HIDDEN, MIXED),
            toy_linear("mix_out", layer, MIXED, HIDDEN),
        )
        self.vectors = (Vector("norm", f"toy.{layer}.norm.weight", HIDDEN, offset=1.0),)
        self.buffers = (BufferSet("narrow", (("normed", HIDDEN),)), BufferSet("wide", (("mixed", MIXED),)))

    def forward(self, run, weights, state, work):
        lanes, tier = run.lanes, run.step.tier
        first, second = weights.linears["mix_in"], weights.linears["mix_out"]
        normed, mixed = work.of("normed", HIDDEN), work.of("mixed", MIXED)
        normalize(lanes, Norm(weights.vector("norm"), EPS), work.residual, normed, first.has_host_features(tier))
        linear(lanes, first, tier, normed, mixed)
        split = SplitInput(mixed, first.device_features(tier))
        linear_add(lanes, second, tier, split, work.residual, work.scratch)


class Decay(Block):
    """A block that keeps a running sum of each sequence, computed by torch where the residual stream lives."""

    kind, small_calls, records = "decay", 2, False

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.linears = (toy_linear("decay_out", layer, HIDDEN, HIDDEN),)
        self.vectors = (Vector("norm", f"toy.{layer}.norm.weight", HIDDEN, offset=1.0),)
        self.state = FixedState((HIDDEN,))
        self.buffers = (BufferSet("narrow", (("normed", HIDDEN),)),)

    def forward(self, run, weights, state, work):
        lanes, out = run.lanes, weights.linears["decay_out"]
        normed = work.of("normed", HIDDEN)
        normalize(lanes, Norm(weights.vector("norm"), EPS), work.residual, normed, False)
        for row, sequence_id in zip(normed.main, state.sequence_ids, strict=True):
            values = state.values.index_select(0, sequence_id[None]) * KEPT + row
            state.values.index_copy_(0, sequence_id[None], values)
            row.copy_(values[0])
        column = HIDDEN if lanes.device is not None else 0
        linear_add(lanes, out, run.step.tier, SplitInput(normed, column), work.residual, work.scratch)


KINDS = {"mixer": Mixer, "decay": Decay}


def toy_model(path, kind):
    """A decoder in which every layer of TOY_LAYERS is one block of this kind and nothing else."""
    model = decoder(ModelConfig.from_dir(path), "fp32")
    layers = tuple((KINDS[kind](i),) if i in TOY_LAYERS else blocks for i, blocks in enumerate(model.layers))
    return replace(model, layers=layers)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def path(kind, tmp_path_factory):
    """A checkpoint with the tensors that the model's declaration asks for."""
    path = make_checkpoint(tmp_path_factory.mktemp(kind), **SHAPE)
    wanted, found = toy_model(path, kind).tensors, load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, shape in wanted.items():
        if name.startswith("toy."):
            found[name] = torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
    save_file({name: found[name] for name in wanted}, path / "model.safetensors")
    return path


def toy_block(kind, tensors, layer, rows):
    """What a toy block adds to rows [tokens, hidden] of one sequence."""
    norm = 1 + tensors[f"toy.{layer}.norm.weight"]
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS) * norm
    if kind == "mixer":
        return normed @ tensors[f"toy.{layer}.mix_in.weight"].T @ tensors[f"toy.{layer}.mix_out.weight"].T
    sums, state = [], torch.zeros(HIDDEN)
    for row in normed:
        state = KEPT * state + row
        sums.append(state)
    return torch.stack(sums) @ tensors[f"toy.{layer}.decay_out.weight"].T


@pytest.fixture(scope="module")
def oracle(kind, path, tmp_path_factory):
    """Logits of the whole model: transformers' own layers, and the toy ones between them."""
    plain = make_checkpoint(tmp_path_factory.mktemp("plain"), **SHAPE)
    tensors = load_file(path / "model.safetensors")

    def logits(token_ids):
        model = hf_model(plain).model
        ids, positions = torch.tensor([token_ids]), torch.arange(len(token_ids))[None]
        rows = model.embed_tokens(ids)
        rope = model.rotary_emb(rows, positions)
        mask = torch.full((len(token_ids),) * 2, -torch.inf).triu(1)[None, None]
        for index, layer in enumerate(model.layers):
            if index in TOY_LAYERS:
                rows = rows + toy_block(kind, tensors, index, rows[0])
                continue
            out = layer(rows, attention_mask=mask, position_ids=positions, position_embeddings=rope)
            rows = out[0] if isinstance(out, tuple) else out
        return hf_model(plain).lm_head(model.norm(rows))[0]

    with torch.inference_mode():
        yield torch.inference_mode()(logits)


def workload_of(path, kind, **sizes):
    sizes = {"max_context": 128, "max_batch": 2, "page_size": 4, "prefill_chunk": 16} | sizes
    return build_workload(toy_model(path, kind), "fp32", "toy", Sizes(**sizes))


def engine_of(path, kind, plan, overlap=True):
    config, hardware = ModelConfig.from_dir(path), HardwareProfile.named("emulated")
    planned = PlannedModel(path, config, "fp32", plan.device, hardware, plan, spec=toy_model(path, kind))
    return build_engine(planned, overlap)


def test_a_layer_without_a_cache_has_none(path, kind):
    workload = workload_of(path, kind)

    assert [shard.layer for shard in workload.kv] == [0, 2]
    assert workload.num_layers == 4
    assert [shard.layer for shard in workload.states] == ([] if kind == "mixer" else list(TOY_LAYERS))
    assert [name for name in workload.shard_names() if name.startswith("layers.1.")] == [
        linear.name for linear in toy_model(path, kind).layers[1][0].linears
    ]


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "in-order"])
def test_one_device_equals_the_oracle(path, kind, oracle, overlap):
    """A prompt in four chunks, then token by token."""
    engine = engine_of(path, kind, cpu_plan(workload_of(path, kind)), overlap)
    actual = run_logits(engine, TOKENS, 40)
    engine.close()

    assert nmse(actual, oracle(TOKENS)) <= 1e-10


@pytest.mark.parametrize("gpu,stream,groups", [(0.0, 0.0, 0), (0.4, 0.3, 1), (0.5, 0.5, 2), (1.0, 0.0, 2)])
def test_three_lanes_equal_the_oracle(path, kind, oracle, gpu, stream, groups):
    engine = engine_of(path, kind, uniform_plan(workload_of(path, kind), gpu, stream, groups))
    actual = run_logits(engine, TOKENS, 40)
    engine.close()

    assert nmse(actual, oracle(TOKENS)) <= 1e-10


@pytest.mark.parametrize("shape", ["column", "paired"])
def test_the_planner_places_it(path, kind, oracle, shape):
    """A budget that holds about half of the weights; what the plan says is what is allocated."""
    workload = workload_of(path, kind)
    budget = workload.weight_bytes // 2 + workload.resident_bytes + 16 * workload.activation_bytes_per_row + 200_000
    policy = Policy.parse(f"threads: {THREADS}\nshape: {shape}\n")
    plan = make_plan(workload, HardwareProfile.named("emulated"), policy, device="emulated", gpu_memory_bytes=budget)
    engine = engine_of(path, kind, plan)
    actual, used = run_logits(engine, TOKENS, 40), engine.lanes.device.arena.total_bytes
    engine.close()

    assert nmse(actual, oracle(TOKENS)) <= 1e-10
    assert used == plan.memory.gpu_bytes <= budget
    assert "layers.1" in plan.to_yaml() and "layers.1.kv" not in plan.to_yaml()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_sequences_of_a_batch_do_not_mix(path, kind, oracle, device):
    workload = workload_of(path, kind)
    engine = engine_of(path, kind, cpu_plan(workload) if device == "cpu" else uniform_plan(workload, 0.5, 0.2, 1))

    for tokens, actual in batch_and_again(engine, TOKENS):
        assert nmse(actual, oracle(tokens)[-len(actual) :]) <= 1e-10


def test_a_fork_goes_on_with_the_state_and_a_rewind_is_refused(path, kind, oracle):
    engine = engine_of(path, kind, cpu_plan(workload_of(path, kind)))
    sequence = engine.kv_cache.open(60)
    engine.prefill(sequence, TOKENS[:12])
    twin = engine.kv_cache.fork(sequence, 60)
    engine.decode_step([sequence], TOKENS[30:31])
    actual = engine.decode_step([twin], TOKENS[12:13])[0]
    rewound = engine.kv_cache.rewind(twin, 5)
    engine.close()

    assert nmse(actual, oracle(TOKENS[:13])[-1]) <= 1e-10
    assert rewound == (kind == "mixer")


def test_a_missing_tensor_of_a_block_is_named(path, kind, tmp_path):
    tensors = load_file(path / "model.safetensors")
    del tensors["toy.3.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")

    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="toy.3.norm.weight"):
        checkpoint.check(toy_model(path, kind))


def test_layers_of_other_widths_share_the_widest_buffers(path, kind):
    widths = ActivationWidths.of(toy_model(path, kind)).by_name

    assert widths["normed"] == HIDDEN
    assert widths.get("mixed") == (MIXED if kind == "mixer" else None)


def test_a_buffer_in_two_places_is_refused():
    groups = (BufferSet("wide", (("a", 1), ("b", 2))), BufferSet("wide", (("a", 1),)))

    with pytest.raises(ValueError, match="buffer a"):
        widest_sets(groups)
