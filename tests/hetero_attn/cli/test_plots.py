"""Pictures that are read in a page: as wide as its text, units and names on every axis, distinct in grey."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from hetero_attn.cli import plots
from placement import HardwareProfile, Policy, make_plan
from placement.machine.rates import CopyRate, DtypeRates, RowRate, ThreadRate
from placement.plots import short_count
from tests.support.planning.planning_models import llama_8b

matplotlib = pytest.importorskip("matplotlib", reason="the plot extra is not installed")
A4_INCHES = (8.3, 11.7)
RATES = DtypeRates(1e11, 2e11, 3e11, 5.678e11)
MACHINE = replace(
    HardwareProfile.named("rtx3060-ddr4"),
    thread_sweep=(ThreadRate(1, 2e10, 3e10), ThreadRate(6, 4e10, 4e10)),
    cpu_rows=(RowRate(1, RATES), RowRate(8, RATES)),
    gpu_rows=(RowRate(1, RATES), RowRate(8, RATES)),
    copies=(CopyRate(1 << 20, 1e10, 1e10, 5e9, 5e9), CopyRate(1 << 24, 2e10, 2e10, 5e9, 5e9)),
)


@pytest.fixture(scope="module")
def plan():
    workload = llama_8b(dtype="q4", context=4096)
    policy = Policy.parse('rules:\n  - {match: "layers.*.gate_up", gpu: 0.5, stream: 0.2, cpu: 0.3}\n')
    return make_plan(workload, MACHINE, policy, device="cuda", gpu_memory_bytes=6 << 30)


@pytest.fixture(params=["plan", "profile"])
def axes(request, plan, monkeypatch, tmp_path):
    """The axes of a picture, after it was drawn."""
    kept, draw = [], plots.figure_in

    @contextmanager
    def keep(file, num_axes):
        with draw(file, num_axes) as made:
            kept.extend(made)
            yield made

    monkeypatch.setattr(plots, "figure_in", keep)
    if request.param == "plan":
        bigger = replace(plan, gpu_memory_bytes=7 << 30)
        plots.plot_plan(plan, [plan, bigger], tmp_path / "p.png")
    else:
        plots.plot_profile(MACHINE, tmp_path / "p.png")
    return kept


def test_a_picture_fits_a_page_and_every_axis_has_its_name_and_unit(axes):
    width, height = axes[0].figure.get_size_inches()

    assert width <= A4_INCHES[0] and height <= A4_INCHES[1]
    for axis in axes:
        assert axis.get_title() and axis.get_xlabel()
        assert axis.get_ylabel() or axis.containers
        assert len(axis.figure.axes) == len(axes), "two scales in one panel"


def test_nothing_lies_outside_the_picture_or_on_the_frame(axes):
    """A top line was clipped by the frame, and a legend lay over a curve."""
    figure = axes[0].figure
    figure.draw_without_rendering()
    page = figure.bbox
    for axis in axes:
        box = axis.get_tightbbox()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 + 1 and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1
        for line in axis.get_lines():
            values = [value for value in line.get_ydata() if line.get_linestyle() != ":"]
            assert all(value < axis.get_ylim()[1] for value in values), axis.get_title()


def luminance(colour):
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_what_lies_side_by_side_is_distinct_in_grey(axes):
    grey = sorted(map(luminance, plots.COLOURS.values()))

    assert all(right - left > 0.15 for left, right in zip(grey, grey[1:], strict=False))
    assert len(set(plots.HATCHES.values())) == len(plots.HATCHES)
    for axis in axes:
        looks = [(line.get_marker(), line.get_linestyle()) for line in axis.get_lines()]
        assert len(set(looks)) == len(looks), axis.get_title()


@pytest.mark.parametrize("tokens,text", [(128, "128"), (2048, "2k"), (131072, "128k"), (1500, "1500")])
def test_counts_of_tokens_are_short(tokens, text):
    assert short_count(tokens) == text


@pytest.mark.parametrize("count", [2, 5, 16, 17, 31, 33, 81, 127])
def test_labels_of_layers_do_not_run_into_each_other(count):
    """31 of them, "10111213" and "29head", stood on an axis 7 inches wide."""
    found = plots._few([str(number) for number in range(count)])
    gaps = [after - before for before, after in zip(found, found[1:], strict=False)]

    assert found[0] == 0 and found[-1] == count - 1 and len(found) <= 17
    assert count <= 16 or min(gaps) > gaps[0] / 2, found
