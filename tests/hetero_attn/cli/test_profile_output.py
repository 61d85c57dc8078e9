"""What `profile` shows of a measured machine: every table, the thread count in use, and the picture."""

from dataclasses import replace

import pytest

from hetero_attn.cli.plots import plot_profile
from hetero_attn.cli.profile_table import profile_table
from placement import HardwareProfile
from placement.machine.rates import AttentionRate, CopyRate, DtypeRates, RowRate, ThreadRate


def rows(*counts: int) -> tuple[RowRate, ...]:
    return tuple(RowRate(count, DtypeRates(1e9 * count, 2e9 * count, 3e9 * count, 4e9 * count)) for count in counts)


@pytest.fixture
def machine() -> HardwareProfile:
    return replace(
        HardwareProfile.named("rtx4090-ddr5"),
        thread_sweep=(ThreadRate(8, 41e9, 52e9), ThreadRate(16, 63e9, 74e9)),
        cpu_rows=rows(1, 64),
        gpu_rows=rows(1, 8, 512),
        cpu_attention=(AttentionRate(16, 4, 128, 33e9, 91e9), AttentionRate(4.5, 8, 64, 22e9, 81e9))
        + (AttentionRate(8.25, 1, 64, 31e9, 92e9), AttentionRate(5, 1, 64, 29e9, 93e9)),
        copies=(CopyRate(1 << 20, 12e9, 13e9, 4e9, 5e9),),
        cpu_attention_slowdown_while_copying=0.62,
    )


def test_every_measurement_is_in_the_table(machine):
    text = profile_table(machine, 120)

    for line in (
        "16       63.0 GB/s   74.0 GB/s  used",
        "64    64   128  192  256",
        "bf16             4        128  33.0 GB/s    91 Gop/s",
        "4.5 bits",
        "q8               1         64  31.0 GB/s    92 Gop/s",
        "q4               1         64  29.0 GB/s    93 Gop/s",
        "1.00 MiB      12.0 GB/s        13.0 GB/s        4.0 GB/s          5.0 GB/s",
        "CPU attention while copies run",
        "full rate from 512",
    ):
        assert " ".join(line.split()) in " ".join(text.split()), (line, text)
    assert "62%" in text and "no GPU was found" not in text


def test_formats_that_were_not_measured_are_listed_under_their_neighbour(machine):
    rates = replace(machine.cpu_linear_bytes_per_s, others=(("q6_k", 44e9),))
    text = profile_table(replace(machine, cpu_linear_bytes_per_s=rates), 200)

    assert "CPU linear q6_k, one row" in text and "44.0 GB/s" in text
    lines = {line.partition(":")[0]: line.partition(":")[2].split(", ") for line in text.splitlines() if ":" in line}
    assert "q4_k" in lines["planned by the rates of q4"] and "q6_k" not in lines["planned by the rates of q8"]


def test_without_a_gpu_its_tables_are_left_out(machine):
    text = profile_table(replace(machine, h2d_bytes_per_s=0.0, gpu_rows=(), copies=()), 120)

    assert "no GPU was found" in text and "GPU and bus" not in text and "copies over" not in text


def test_the_picture_shows_threads_rows_and_copies(machine, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")

    plot_profile(machine, tmp_path / "profile.png")

    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
