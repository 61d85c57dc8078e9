"""The path for arm64: compiled here for its CPUs, looked at as assembly, and run where a user-mode emulator is."""

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from cpu_kernels.attention.parameters import DecodeTiles
from cpu_kernels.formats import format_of, unit_bytes
from cpu_kernels.linear.op import scratch_bytes
from cpu_kernels.team.arguments import LINEAR
from cpu_kernels.team.words import ARGUMENT_BYTES, PARAMETERS
from cpu_kernels.vectors.isa import available, named
from tests.support.kernels.cpu_oracles import kernels, pack
from tests.support.kernels.cross_compile import Cpu, assembly_of, objects_of
from tests.support.kernels.loop_bodies import blocks_of, busiest_block, linear_kernel

LINUX, APPLE = "aarch64-unknown-linux-gnu", "arm64-apple-macosx14.0"
CPUS = ((LINUX, "neoverse-n1"), (LINUX, "neoverse-v2"), (APPLE, "apple-m1"))
FORMATS = ("q4", "q8", "q4_k", "q5_k", "q6_k", "iq4_xs")
# Instructions of the loop body for 64 inputs of 16 features and one row, over the products: what codes and scales cost.
MOST_INSTRUCTIONS = {"q4": 280, "q8": 280, "q4_k": 360, "q5_k": 610, "q6_k": 550, "iq4_xs": 370}
DOTS = 64  # 16 features times 64 inputs, 16 products an instruction
MEMORY = 0x40000000  # where the emulated program keeps what the kernel is told, reads and writes
START = f"""
_start: .global _start
  mov x8, #63       // read the standard input
  mov x0, #0
  mov x1, #{MEMORY}
  mov x2, #0x400000
  svc #0
  mov x19, x0
  sub sp, sp, #16
  mov x0, sp
  mov x1, #0
  mov x2, #{MEMORY}
  mov x3, #0
  bl kernel
  mov x8, #64       // write it all to the standard output
  mov x0, #1
  mov x1, #{MEMORY}
  mov x2, x19
  svc #0
  mov x8, #93       // exit
  mov x0, #0
  svc #0
sched_yield: .global sched_yield
  mov w0, #0
  ret
.section .memory, "aw", @nobits
  .space 0x400000
"""
TOOLS = ("qemu-aarch64", "aarch64-linux-gnu-as", "aarch64-linux-gnu-ld")


@pytest.fixture(scope="module")
def assembly(request) -> dict[tuple[tuple, Cpu], str]:
    """Of every kernel that is looked at in this run, for the CPUs that it is looked at for."""
    looks = [item.callspec.params for item in request.session.items if item.function is LOOKED_AT]
    return assembly_of(
        "neon",
        {
            linear_kernel(name, 1): [look["cpu"] for look in looks if look["weight_dtype"] == name]
            for name in {look["weight_dtype"]: None for look in looks}
        },
    )


@pytest.fixture(scope="module")
def emulated() -> dict[str, bytes]:
    """The kernel of each format that an emulator is to run, an object file."""
    kernels_of = {name: linear_kernel(name, 4) for name in FORMATS}
    found = objects_of("neon", dict.fromkeys(kernels_of.values(), CPUS[:1]))
    return {name: found[kernel, CPUS[0]] for name, kernel in kernels_of.items()}


@pytest.mark.table
@pytest.mark.parametrize("cpu", CPUS, ids=lambda cpu: cpu[1])
@pytest.mark.parametrize(
    "weight_dtype",
    [pytest.param(name, marks=pytest.mark.matrix if name in ("q5_k", "q6_k", "iq4_xs") else ()) for name in FORMATS],
)
def test_inner_loops_are_made_of_dot_products(assembly, weight_dtype, cpu):
    sdot = "sdot.4s" if cpu[0] == APPLE else "sdot"
    loop = busiest_block(assembly[linear_kernel(weight_dtype, 1), cpu], sdot)

    assert DOTS <= loop[sdot] <= DOTS + 8
    others = sum(count for name, count in loop.items() if name.startswith(("smull", "smlal", "cmeq", "bsl")))
    assert loop["bl"] == 0 and others <= 16  # the minima's and offsets' few products are of int16
    assert loop.total() <= MOST_INSTRUCTIONS[weight_dtype]


LOOKED_AT = test_inner_loops_are_made_of_dot_products


def widening_loops(kernel) -> dict[Cpu, list[Counter]]:
    """The loops of a kernel that multiply bf16, for every CPU: widened by shifts and masks, multiplied as float32."""
    found = {}
    for (_, cpu), code in assembly_of("neon", {kernel: CPUS}).items():
        fmla, shl, keep = ("fmla.4s", "shl.4s", "and.16b") if cpu[0] == APPLE else ("fmla", "shl", "and")
        blocks = [
            Counter(fmla=block[fmla], shl=block[shl], keep=block[keep], all=block.total()) for block in blocks_of(code)
        ]
        found[cpu] = [block for block in blocks if block["fmla"] >= DOTS and block["shl"] == block["keep"] > 0]
    return found


@pytest.mark.parametrize(("rows", "widened", "instructions"), [("one", 1, 3.2), ("several", 0.5, 3)])
def test_bf16_is_widened_and_multiplied_by_fmla(rows, widened, instructions):
    """One row: a vector of weights is widened for each product. Several rows: for all of them at once. instructions: for
    each fmla, all in all."""
    isa = named("neon")
    tile = (1, 1) if rows == "one" else (isa.dot_features, isa.dot_rows)

    for cpu, loops in widening_loops(("linear.dot_kernel", "linear_dot", "ISA", "bf16", *tile)).items():
        assert any(
            loop["shl"] + loop["keep"] <= widened * loop["fmla"] and loop["all"] <= instructions * loop["fmla"]
            for loop in loops
        ), cpu


def test_decode_attention_widens_keys_and_values_once_for_four_heads():
    """Both products of the attention, that with keys and that with values."""
    tiles = DecodeTiles.of("bf16", 4, 128, named("neon"))
    parameters = ("bf16", tiles.score_heads, tiles.value_heads, tiles.words, False)

    for cpu, loops in widening_loops(("attention.decode_kernel", "decode", "ISA", *parameters)).items():
        products = [loop for loop in loops if 4 * (loop["shl"] + loop["keep"]) == loop["fmla"]]
        assert sum(loop["all"] <= 2.5 * loop["fmla"] for loop in products) >= 2, cpu


def test_every_arm64_cpu_with_sdot_takes_this_path(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")

    assert available(frozenset({"neon", "dotprod"})) == ("neon", "portable")
    assert available(frozenset({"neon"})) == ("portable",)


@pytest.mark.parametrize("weight_dtype", FORMATS)
def test_an_emulated_arm64_gives_the_same_bits(weight_dtype, tmp_path, request):
    if missing := [name for name in TOOLS if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (packages qemu-user, binutils-aarch64-linux-gnu)")
    rows, in_features, blocks = 5, 512, 3
    torch.manual_seed(1)
    weight, x = random_weight(weight_dtype, in_features, blocks), torch.randn(rows, in_features)
    expected = torch.empty(rows, 16 * blocks)
    kernels().linear(x, weight, weight_dtype, None, expected)

    program = linked(request.getfixturevalue("emulated")[weight_dtype], tmp_path)
    memory, out_at = told(x, weight, weight_dtype, blocks)
    (tmp_path / "memory").write_bytes(memory)
    with (tmp_path / "memory").open("rb") as given:
        run = subprocess.run([TOOLS[0], program], stdin=given, capture_output=True, check=True)
    actual = torch.frombuffer(bytearray(run.stdout[out_at : out_at + expected.nbytes]), dtype=torch.float32)

    assert torch.equal(actual.view(rows, -1), expected)


def linked(kernel: bytes, folder: Path) -> Path:
    """A program that reads its memory, runs the kernel and writes its memory."""
    (folder / "kernel.o").write_bytes(kernel)
    _, assembler, linker = TOOLS
    subprocess.run([assembler, "-o", folder / "start.o"], input=START, text=True, check=True)
    place = f"--section-start=.memory={MEMORY:#x}"
    objects = (folder / "kernel.o", folder / "start.o")
    subprocess.run([linker, place, "-z", "noexecstack", "-o", folder / "program", *objects], check=True)
    return folder / "program"


def random_weight(weight_dtype: str, in_features: int, blocks: int) -> torch.Tensor:
    """A packed weight; of a form that `pack` does not make, random codes and scales that are all alike."""
    if weight_dtype in ("q4", "q8"):
        return pack(torch.randn(16 * blocks, in_features), weight_dtype)
    item = format_of(weight_dtype)
    weight = torch.randint(0, 256, (blocks, unit_bytes(weight_dtype, in_features)), dtype=torch.uint8)
    weight.view(blocks, -1, item.superblock_bytes)[:, :, : 64 * item.header_lines] = 0x14
    return weight


def told(x: torch.Tensor, weight: torch.Tensor, weight_dtype: str, blocks: int) -> tuple[bytes, int]:
    """(the memory of the emulated program, where in it the output will be)."""
    rows, in_features = x.shape
    scratch = scratch_bytes(named("neon"), weight_dtype, rows, in_features)
    sizes = {"arguments": ARGUMENT_BYTES, "scratch": scratch, "x": x.nbytes, "weight": weight.nbytes}
    at, places = 0, {}
    for name, size in (*sizes.items(), ("out", rows * 64 * blocks)):
        places[name] = at
        at += -(-size // 64) * 64
    memory = bytearray(at)
    for name, tensor in (("x", x), ("weight", weight)):
        memory[places[name] : places[name] + tensor.nbytes] = tensor.numpy().tobytes()
    words = LINEAR.filled(
        x=MEMORY + places["x"],
        x_row=4 * in_features,
        rows=rows,
        in_features=in_features,
        weight=MEMORY + places["weight"],
        num_blocks=blocks,
        block_bytes=weight.shape[1],
        bias=0,
        out=MEMORY + places["out"],
        out_row=64 * blocks,
        accumulate=0,
        piece=in_features,
        smallest=1,
        parts=2,
        run=blocks,
        weight_run=0,
        out_run=64 * blocks,
    )
    given = (MEMORY + places["scratch"], *words)
    content = b"".join(int(word).to_bytes(8, "little") for word in given)
    memory[PARAMETERS : PARAMETERS + len(content)] = content
    return bytes(memory), places["out"]
