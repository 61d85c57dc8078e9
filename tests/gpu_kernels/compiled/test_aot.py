"""Every kernel compiled ahead of time for the GPUs we claim: no spills, within shared memory, wide loads, tensor cores.

An ordinary run compiles every launch for one or two architectures; `-m aot_full` compiles all for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cpu_kernels.contract import ChunkKeys, DeltaRule, DeltaStates, Pages, Partial, Picks, Rotation, RowKeys

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without the interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gpu_kernels
from gpu_kernels import kv_pages, reference
from gpu_kernels.attention import prefill as prefill_op
from gpu_kernels.attention import tiles
from gpu_kernels.experts.ordered import WHOLE_FORMS
from gpu_kernels.forms.unpack import FORMS
from tests.support.gpu.ahead_of_time import SHARED_MEMORY_LIMIT, Resources, compile_launches, compile_together

HIDDEN, HEADS, KV_HEADS, PAGE = 4096, 32, 8, 16
BF16, FP32, Q8, Q4 = torch.bfloat16, torch.float32, torch.int8, torch.uint8


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def kv_store(dtype: torch.dtype, head_dim: int, page: int = PAGE) -> torch.Tensor:
    return empty(4096, page, kv_pages.row_items(dtype, head_dim), dtype=dtype)


def decode(
    dtype: torch.dtype, head_dim: int, kv_heads: int, max_pages: int = 1024, page: int = PAGE, cap: float = 0.0
) -> Callable[[], None]:
    q, pages = empty(2, HEADS, head_dim), kv_store(dtype, head_dim, page)
    table, limit = empty(2, kv_heads, max_pages, dtype=torch.int32), empty(2, dtype=torch.int32)
    return lambda: gpu_kernels.decode_attention(
        q, Pages(pages, pages), RowKeys(table, limit, limit), 0.1, Partial(q, q[..., 0].contiguous()), cap
    )


def prefill(dtype: torch.dtype, head_dim: int, page: int = PAGE, cap: float = 0.0) -> Callable[[], None]:
    q, pages = empty(512, HEADS, head_dim), kv_store(dtype, head_dim, page)
    table = empty(KV_HEADS, 1024, dtype=torch.int32)
    return lambda: gpu_kernels.prefill_attention(
        q, Pages(pages, pages), ChunkKeys(table, 0, 4096, 3584), 0.1, Partial(q, q[..., 0].contiguous()), cap
    )


def linear(
    weight_dtype: str,
    rows: int,
    out_features: int = HIDDEN,
    bias: bool = False,
    accumulate: bool = False,
    int8_rows: int = 64,
) -> Callable[[], None]:
    weight = empty(out_features // 16, reference.block_bytes(weight_dtype, HIDDEN), dtype=torch.uint8)
    out = empty(rows, out_features)
    x, added = empty(rows, HIDDEN), out[0] if bias else None
    return lambda: gpu_kernels.linear(
        gpu_kernels.rounded(x, weight_dtype, int8_rows), weight, weight_dtype, added, out, accumulate
    )


def merge(parts: int, head_dim: int) -> Callable[[], None]:
    partial = Partial(empty(2, HEADS, head_dim), empty(2, HEADS))
    return lambda: gpu_kernels.merge([partial] * parts, partial)


def rms_norm() -> None:
    gpu_kernels.rms_norm(empty(4, HIDDEN), empty(HIDDEN), 1e-5, empty(4, HIDDEN))


def copy_rows(rows: int, columns: int, stride: int) -> None:
    gpu_kernels.copy_rows(empty(rows, stride)[:, :columns], empty(rows, columns))


def rms_norm_added() -> None:
    gpu_kernels.rms_norm(empty(4, HIDDEN), empty(HIDDEN), 1e-5, empty(4, HIDDEN), True)


def layer_norm(has_bias: bool) -> Callable[[], None]:
    bias = empty(HIDDEN) if has_bias else None
    return lambda: gpu_kernels.layer_norm(empty(4, HIDDEN), empty(HIDDEN), bias, 1e-5, empty(4, HIDDEN))


def gelu_mul() -> None:
    gpu_kernels.gelu_mul(empty(4, 28672), empty(4, 14336))


def rounded_norm(weight_dtype: str, rows: int) -> Callable[[], None]:
    x = empty(rows, HIDDEN)
    return lambda: gpu_kernels.rounded_norm(x, empty(HIDDEN), 1e-5, x, weight_dtype)


def rounded_gated(weight_dtype: str, rows: int) -> Callable[[], None]:
    both, out = empty(rows, 28672), empty(rows, 14336)
    return lambda: gpu_kernels.rounded_gated(both, out, "silu_mul", weight_dtype)


def experts(weight_dtype: str, rows: int, by_place: bool = False) -> Callable[[], None]:
    """8 of 128 experts, of 2048 inputs and 96 blocks of features, for every row."""
    weight = empty(128, 96, reference.block_bytes(weight_dtype, 2048), dtype=torch.uint8)
    starts, sources = empty(129, dtype=torch.int32), None if by_place else empty(8 * rows, dtype=torch.int32)
    x, out = empty(8 * rows if by_place else rows, 2048), empty(8 * rows, 96 * 16)
    return lambda: gpu_kernels.expert_linear(x, Picks(sources, starts, 0), weight, weight_dtype, out)


def silu_mul() -> None:
    gpu_kernels.silu_mul(empty(4, 28672), empty(4, 14336))


def clamped_silu_mul() -> None:
    gpu_kernels.clamped_silu_mul(empty(4, 5760), 1.702, 7.0, empty(4, 2880))


def rope_append(head_dim: int, norm: bool, dtype: torch.dtype = BF16) -> Callable[[], None]:
    qkv, pages = empty(4, KV_HEADS, 6 * head_dim), kv_store(dtype, head_dim)
    indices, angles = empty(4, dtype=torch.int64), empty(4096, head_dim // 2)
    weight, q = empty(head_dim) if norm else None, empty(4, HEADS, head_dim)
    slots = empty(4, KV_HEADS, dtype=torch.int64)
    return lambda: gpu_kernels.rope_append(
        qkv, indices, Rotation(angles, angles, weight, weight, 1e-6), q, Pages(pages, pages), slots
    )


def delta_step(per_key: int, rows: int = 1, key_dim: int = 128, value_dim: int = 128) -> Callable[[], None]:
    """16 key heads; the gates, the state and the taps as a model has them."""
    heads = 16 * per_key
    features, sizes = 32 * key_dim + heads * value_dim, (key_dim, per_key * value_dim)
    rule = DeltaRule(empty(features, 4).T, empty(heads), empty(heads), empty(value_dim), 1e-6)
    projected, gates = empty(rows, 16, 2 * sum(sizes)), empty(rows, 2 * heads)
    states, ids = empty(4, heads * key_dim * value_dim + 3 * features), empty(rows, dtype=torch.int64)
    return lambda: gpu_kernels.delta_step(
        projected, gates, rule, DeltaStates(states), ids, empty(rows, heads * value_dim)
    )


ORDINARY_FORMS = {"q4_k", "q6_k", "iq4_xs", "mxfp4", "int4_g128", "fp8", "nf4"}
LESS_USUAL = sorted(set(WHOLE_FORMS) - {"q4", "q8", "mxfp4", "q4_k", "q6_k"})
# launch: what to call, and the architectures of an ordinary run, which is every architecture for one launch of a kind
# (decoding, prompts, one row, few rows by format, many in int8, rounding, experts) or for those of the kind together.
LAUNCHES: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {
    "decode bf16 128 group 4": (decode(BF16, 128, 8), (80, 86, 89, 90, 120)),
    "decode bf16 128 in pages of 64": (decode(BF16, 128, 8, page=64), (90,)),
    "decode q8 128 in pages of 64": (decode(Q8, 128, 8, page=64), (90,)),
    "prefill bf16 128 in pages of 64": (prefill(BF16, 128, page=64), (86,)),
    "prefill q8 128 in pages of 64": (prefill(Q8, 128, page=64), (90,)),
    "linear q4_k 1": (linear("q4_k", 1), (80, 86, 89, 90, 120)),
    "linear q4_k 8": (linear("q4_k", 8, 28672, bias=True, accumulate=True), (90,)),
    "linear q6_k 1": (linear("q6_k", 1), (86,)),
    "linear iq4_xs 1": (linear("iq4_xs", 1), (120,)),
    "linear mxfp4 1": (linear("mxfp4", 1), (89,)),
    "linear int4_g128 1": (linear("int4_g128", 1), (80,)),
    "linear fp8 1": (linear("fp8", 1), (90,)),
    "linear nf4 1": (linear("nf4", 1), (86,)),
    "linear fp16 1": (linear("fp16", 1), (80,)),
    **{f"linear {name} 1": (linear(name, 1), ()) for name in sorted(set(FORMS) - ORDINARY_FORMS)},
    "linear q4_k 16": (linear("q4_k", 16), (80,)),
    "linear q6_k 16": (linear("q6_k", 16), (86,)),
    "linear q5_k 16": (linear("q5_k", 16), ()),
    "linear q5_1 16": (linear("q5_1", 16), ()),
    "linear iq4_xs 16": (linear("iq4_xs", 16), (120,)),
    "linear mxfp4 16": (linear("mxfp4", 16), (89,)),
    "linear fp8 16": (linear("fp8", 16), (90,)),
    "linear nf4 16": (linear("nf4", 16), (86,)),
    "linear nvfp4 16": (linear("nvfp4", 16), ()),
    "decode bf16 64 group 1": (decode(BF16, 64, 32), (86,)),
    "decode bf16 80 group 16": (decode(BF16, 80, 2), (90,)),
    "decode bf16 256 group 8": (decode(BF16, 256, 4), (86,)),
    "decode fp32 128 group 4": (decode(FP32, 128, 8), (86,)),
    "decode bf16 128 one split": (decode(BF16, 128, 8, max_pages=4), (120,)),
    "decode fp32 64 group 1": (decode(FP32, 64, 32), ()),
    "decode fp32 256 group 8": (decode(FP32, 256, 4), ()),
    "decode q8 128 group 4": (decode(Q8, 128, 8), (86,)),
    "decode q4 64 group 1": (decode(Q4, 64, 32), (80,)),
    "decode q4 256 group 8": (decode(Q4, 256, 4), ()),
    "prefill q8 128": (prefill(Q8, 128), (86,)),
    "prefill q4 64": (prefill(Q4, 64), ()),
    "rope_append q8": (rope_append(128, False, Q8), (90,)),
    "rope_append q4": (rope_append(80, False, Q4), (86,)),
    "rope_append q4 norm 128": (rope_append(128, True, Q4), (120,)),
    "rope_append q8 256": (rope_append(256, False, Q8), (89,)),
    "rope_append q4 96": (rope_append(96, False, Q4), ()),
    "decode bf16 32 group 4": (decode(BF16, 32, 8), ()),
    "prefill bf16 128": (prefill(BF16, 128), (80, 86, 89, 90, 120)),
    "prefill bf16 64": (prefill(BF16, 64), (90,)),
    "prefill bf16 80": (prefill(BF16, 80), (86,)),
    "prefill bf16 256": (prefill(BF16, 256), (86,)),
    "prefill fp32 128": (prefill(FP32, 128), (89,)),
    "prefill fp32 64": (prefill(FP32, 64), ()),
    "prefill fp32 256": (prefill(FP32, 256), ()),
    "decode bf16 512 group 8": (decode(BF16, 512, 4), (86,)),
    "decode fp32 512 group 8": (decode(FP32, 512, 4), ()),
    "decode q8 512 group 8": (decode(Q8, 512, 4), ()),
    "prefill bf16 512": (prefill(BF16, 512), (86,)),
    "prefill q4 512": (prefill(Q4, 512), ()),
    "prefill fp32 512": (prefill(FP32, 512), ()),
    "prefill bf16 32": (prefill(BF16, 32), ()),
    "q4 1 row": (linear("q4", 1), (80, 86, 89, 90, 120)),
    "q4 1 row bias": (linear("q4", 1, 28672, bias=True, accumulate=True), (90,)),
    "q8 1 row": (linear("q8", 1), (86,)),
    "q4 8 rows": (linear("q4", 8), (90,)),
    "q4 16 rows": (linear("q4", 16), (80,)),
    "q4 32 rows": (linear("q4", 32), (86,)),
    "q4 64 rows": (linear("q4", 64), (89,)),
    "q4 64 rows wide": (linear("q4", 64, 28672, bias=True, accumulate=True), (120,)),
    "q4 512 rows": (linear("q4", 512, bias=True, accumulate=True), (86, 90)),
    "q8 8 rows": (linear("q8", 8), (80,)),
    "q8 16 rows": (linear("q8", 16), (89,)),
    "q8 16 rows wide": (linear("q8", 16, 28672, bias=True), (90,)),
    "q8 32 rows": (linear("q8", 32), (86,)),
    "q8 64 rows": (linear("q8", 64), (80,)),
    "q8 64 rows wide": (linear("q8", 64, 28672, bias=True, accumulate=True), (120,)),
    "q8 512 rows": (linear("q8", 512), (120,)),
    "q4 512 rows in int8": (linear("q4", 512, 28672, int8_rows=512), (120,)),
    "q4 512 rows in int8 onto": (linear("q4", 512, 28672, True, True, int8_rows=512), (89,)),
    "q4 80 rows in int8": (linear("q4", 80, int8_rows=512), (86,)),
    "q8 512 rows in int8": (linear("q8", 512, 28672, int8_rows=512), (80,)),
    "q8 512 rows in int8 onto": (linear("q8", 512, 28672, True, True, int8_rows=512), (86,)),
    "q8 80 rows in int8": (linear("q8", 80, accumulate=True, int8_rows=512), (90,)),
    "merge 2": (merge(2, 128), (86,)),
    "merge 3 of 80": (merge(3, 80), (90,)),
    "decode capped": (decode(torch.bfloat16, 256, KV_HEADS, cap=50.0), (86,)),
    "prefill capped": (prefill(torch.bfloat16, 256, cap=50.0), (90,)),
    "rms_norm": (rms_norm, (86,)),
    "rms_norm added": (rms_norm_added, (90,)),
    "silu_mul": (silu_mul, (90,)),
    "gelu_mul": (gelu_mul, (86,)),
    "clamped_silu_mul": (clamped_silu_mul, (90,)),
    "layer_norm": (layer_norm(False), (90,)),
    "layer_norm bias": (layer_norm(True), (86,)),
    "gelu": (lambda: gpu_kernels.gelu(empty(4, 12288), empty(4, 12288)), (86,)),
    "gather_columns": (
        lambda: gpu_kernels.gather_columns(empty(4, HIDDEN), empty(HIDDEN, dtype=torch.int32), empty(4, HIDDEN)),
        (90,),
    ),
    "delta_step": (delta_step(2), (80, 86, 89, 90, 120)),
    "delta_step 3 of 8 rows": (delta_step(3, rows=8), (90,)),
    "delta_step 256": (delta_step(2, key_dim=256, value_dim=256), (80,)),
    "delta_step odd": (delta_step(1, key_dim=80, value_dim=48), (86,)),
    "rounded_norm q4": (rounded_norm("q4", 1), (80, 86, 89, 90, 120)),
    "rounded_norm q8 rows": (rounded_norm("q8", 16), (90,)),
    "rounded_norm prompt": (rounded_norm("q4", 512), (90,)),
    "rounded_gated q4": (rounded_gated("q4", 1), (86,)),
    "rounded_gated q8 prompt": (rounded_gated("q8", 512), (80,)),
    "copy_rows": (lambda: copy_rows(1, HIDDEN, HIDDEN), (86,)),
    "copy_rows strided": (lambda: copy_rows(4, 1029, 4099), (80,)),
    "add_rows": (lambda: gpu_kernels.add_rows(empty(1, HIDDEN), empty(1, HIDDEN)), (90,)),
    "experts q4 1": (experts("q4", 1), (80, 86, 89, 90, 120)),
    "experts q4 64": (experts("q4", 64), (90,)),
    "experts q4 512": (experts("q4", 512), (80, 89, 120)),
    "experts q4 512 by place": (experts("q4", 512, True), (90,)),
    "experts q8 1": (experts("q8", 1), (86,)),
    "experts q8 512": (experts("q8", 512), (90,)),
    "experts mxfp4 1": (experts("mxfp4", 1), (120,)),
    "experts mxfp4 512": (experts("mxfp4", 512), (90,)),
    "experts q4_k 1": (experts("q4_k", 1), (86,)),
    "experts q4_k 512": (experts("q4_k", 512), (90,)),
    "experts q6_k 1": (experts("q6_k", 1), (89,)),
    "experts q6_k 512": (experts("q6_k", 512), (86,)),
    **{f"experts {name} 1": (experts(name, 1), ()) for name in LESS_USUAL},
    **{f"experts {name} 512": (experts(name, 512), ()) for name in LESS_USUAL},
    "experts bf16 1": (experts("bf16", 1), (80,)),
    "experts bf16 512": (experts("bf16", 512), (86,)),
    "experts fp32 64": (experts("fp32", 64), ()),
    "experts fp16 64": (experts("fp16", 64), ()),
    "experts nf4 64": (experts("nf4", 64), ()),
    "experts fp8 64": (experts("fp8", 64), ()),
    "rope_append": (rope_append(128, False), (80,)),
    "rope_append norm 80": (rope_append(80, True), (120,)),
}
ORDINARY = [(name, architecture) for name, (_, subset) in LAUNCHES.items() for architecture in subset]
REST = [
    (name, architecture)
    for name in LAUNCHES
    for architecture in SHARED_MEMORY_LIMIT
    if (name, architecture) not in ORDINARY
]


def check(used: Resources, name: str, architecture: int) -> None:
    """Assert what every kernel must keep, and what its kind promises; float32 products have no tensor core."""
    assert used.stack_bytes == 0 and used.local_accesses == 0, used
    assert used.shared_bytes <= SHARED_MEMORY_LIMIT[architecture], used
    if used.kernel in ("_prefill_attention_kernel", "_flat_kernel", "_int8_tile_kernel") and "fp32" not in name:
        assert used.tensor_core > 0, used
    if used.kernel in ("_flat_kernel", "_int8_tile_kernel"):
        assert used.int8_products > 0, used
    if used.kernel == "_decode_attention_kernel":
        narrow = 0.3 if "q4" in name else 0.4  # the others are page ids, and the scales and minima of codes
        assert used.wide_loads >= narrow * used.loads, used
    if used.kernel == "_tile_kernel":
        assert used.int8_products > 0, used
    if used.kernel in ("_gemv_kernel", "_form_gemv_kernel", "_pick_kernel"):
        assert used.dp4a > 0 and used.wide_loads > 0, used
    if used.kernel in ("_number_gemv_kernel", "_half_gemv_kernel"):
        assert used.wide_loads > 0, used
    if used.kernel.endswith("_gemv_kernel") or used.kernel == "_flat_kernel":
        assert used.loop_exchanges == 0, used
    if used.kernel == "_delta_step_kernel":  # sums of columns pass through shared memory, the state does not
        assert used.wide_loads > 0 and used.shared_bytes <= 8192, used
    if used.kernel == "_dequantize_kernel":
        assert used.wide_loads > 0 and used.shared_bytes == 0, used


@pytest.fixture(autouse=True)
def tiles_of_the_architecture(request, monkeypatch):
    """Tensors without memory have no device that could say what it is."""
    architecture = getattr(request.node, "callspec", None) and request.node.callspec.params["architecture"]
    monkeypatch.setattr(prefill_op, "is_hopper", lambda device: architecture == 90)


@pytest.fixture(scope="module")
def begun() -> set[tuple[object, int]]:
    """The tests and architectures whose launches were compiled together."""
    return set()


@pytest.fixture
def compiled_together(request, tiles_of_the_architecture, begun, architecture):
    """The first test of an architecture does for all that were asked for what each would start a process for."""
    if (request.function, architecture) not in begun:
        begun.add((request.function, architecture))
        chosen = [item.callspec.params for item in request.session.items if item.function is request.function]
        names = [each["name"] for each in chosen if each["architecture"] == architecture]
        compile_together([LAUNCHES[name][0] for name in names], architecture)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("compiled_together")
@pytest.mark.parametrize("name,architecture", ORDINARY)
def test_compiles_within_limits(name, architecture):
    kernels = compile_launches(LAUNCHES[name][0], architecture)

    assert kernels
    for used in kernels:
        check(used, name, architecture)


def test_a_tile_that_spills_is_seen(monkeypatch):
    monkeypatch.setitem(tiles.DECODE_TILES[FP32], 128, tiles.Tile(0, 32, 4, 2))
    used = compile_launches(decode(FP32, 128, 8), 86)[0]

    with pytest.raises(AssertionError, match="stack_bytes"):
        check(used, "decode fp32 128", 86)


@triton.jit
def _copy_with_cv(target, source):
    tl.store(target + tl.arange(0, 128), tl.load(source + tl.arange(0, 128), cache_modifier=".cv"))


def test_no_kernel_relies_on_a_cache_modifier_that_triton_drops():
    """`.cv` reads as if it kept the GPU from a stale copy of host memory; the compiled load is an ordinary one."""
    source = ASTSource(_copy_with_cv, {"target": "*fp32", "source": "*fp32"})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    relying = [
        path.name
        for path in Path(gpu_kernels.__file__).parent.rglob("*.py")
        if 'cache_modifier=".cv"' in path.read_text()
    ]

    assert "ld.global" in ptx and ".cv" not in ptx
    assert relying == []


@pytest.mark.aot_full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("compiled_together")
@pytest.mark.parametrize("name,architecture", REST)
def test_compiles_within_limits_on_the_other_architectures(name, architecture):
    for used in compile_launches(LAUNCHES[name][0], architecture):
        check(used, name, architecture)
