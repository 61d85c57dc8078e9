"""Hardware profiles: round trips, the catalogue, thread counts, and bad values."""

import json
from dataclasses import replace

import pytest
import yaml

from placement import HardwareProfile, catalogue_names
from placement.machine.hardware import CATALOGUE

WELL_KNOWN = {
    "laptop-8gb-ddr5",
    "rtx3060-ddr4",
    "rtx4060ti-ddr5",
    "rtx4090-ddr5",
    "rtx5090-ddr5",
    "a10-server",
    "l4-server",
    "a100-server",
    "h100-server",
    "h200-server",
    "jetson-agx-orin",
}


@pytest.mark.parametrize("name", catalogue_names())
def test_catalogue_machine_is_plausible_and_says_where_it_comes_from(name):
    machine = HardwareProfile.named(name)
    text = (CATALOGUE / f"{name}.yaml").read_text(encoding="utf-8")

    assert text.startswith("# ") and machine.source and "measured" != machine.source
    assert machine.cpu_linear_bytes_per_s.bf16 <= machine.dram_bytes_per_s
    assert not machine.has_gpu or machine.gpu_bytes_per_s >= machine.h2d_bytes_per_s
    assert machine == HardwareProfile.from_json(machine.to_json())


def test_catalogue_covers_the_well_known_machines():
    assert set(catalogue_names()) >= WELL_KNOWN
    assert [name for name in WELL_KNOWN if HardwareProfile.named(name).unified_memory] == ["jetson-agx-orin"]


def test_unknown_machine_lists_the_nearest():
    with pytest.raises(ValueError, match="unknown hardware 'rtx4090'; did you mean rtx4090-ddr5"):
        HardwareProfile.named("rtx4090")


def test_a_path_is_not_a_catalogue_name():
    with pytest.raises(ValueError, match="unknown hardware"):
        HardwareProfile.named("../policies/auto")


def test_fingerprint_survives_the_round_trip_and_does_not_change_equality():
    machine = replace(HardwareProfile.named("generic-cpu"), fingerprint=(("cpu", "x"), ("threads", "2")))

    again = HardwareProfile.from_json(machine.to_json())

    assert machine.fingerprint == again.fingerprint
    assert again == HardwareProfile.named("generic-cpu")


def test_threads_scale_operations_and_bandwidth_up_to_dram():
    machine = HardwareProfile.named("rtx4090-ddr5")

    few, many = machine.with_threads(4), machine.with_threads(64)

    assert machine.cpu_ops_per_s.bf16 / 4 == few.cpu_ops_per_s.bf16
    assert machine.cpu_linear_bytes_per_s.q4 / 4 == few.cpu_linear_bytes_per_s.q4
    assert machine.dram_bytes_per_s == many.cpu_linear_bytes_per_s.q4


def catalogue_values():
    return yaml.safe_load((CATALOGUE / "rtx4090-ddr5.yaml").read_text(encoding="utf-8")) | {"name": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dram_bytes_per_sec": 1}, "unknown field 'dram_bytes_per_sec'; did you mean 'dram_bytes_per_s'"),
        ({"dram_bytes_per_s": 0}, "dram_bytes_per_s must be positive"),
        ({"dram_bytes_per_s": "fast"}, "dram_bytes_per_s must be a number, got 'fast'"),
        ({"handover_s": -1}, "handover_s must be a finite number >= 0"),
        ({"handover_s": float("nan")}, "handover_s must be a finite number >= 0"),
        ({"cores": True}, "cores must be a finite number"),
        ({"cores": 1.5}, "cores must be a whole number, got 1.5"),
        ({"name": 5}, "name must be text without control characters, got 5"),
        ({"source": "a\x1b[31m"}, "source must be text without control characters"),
        ({"gpu_bytes_per_s": 0}, "a GPU .* needs positive d2h_bytes_per_s, gpu_bytes_per_s"),
        ({"gpu_flops": {"fp32": 1}}, "gpu_flops needs one value for each of fp32, bf16, q8, q4"),
        ({"cpu_slowdown_while_copying": 2}, r"must be in \(0, 1\]"),
    ],
)
def test_bad_values_name_field_and_rule(change, message):
    with pytest.raises(ValueError, match=message):
        HardwareProfile.from_dict(catalogue_values() | change)


def test_rates_are_keyed_by_format_and_a_file_may_have_more_than_the_four():
    values = catalogue_values()
    values["cpu_linear_bytes_per_s"] |= {"q6_k": 40e9}
    values["cpu_rows"] = [{"rows": 1, "ops_per_s": {"fp32": 1e9, "bf16": 2e9, "q8": 4e9, "q4": 8e9, "q6_k": 5e9}}]
    machine = HardwareProfile.from_dict(values)

    again = HardwareProfile.from_json(machine.to_json())

    assert again == machine == HardwareProfile.from_dict(yaml.safe_load(machine.to_yaml()))
    assert machine.cpu_linear_bytes_per_s.of("q6_k") == 40e9
    assert machine.cpu_rows[0].ops_per_s.of("q6_k") == 5e9
    assert machine.with_threads(machine.cores // 2).cpu_linear_bytes_per_s.of("q6_k") == 20e9
    assert json.loads(machine.to_json())["cpu_linear_bytes_per_s"]["q6_k"] == 40e9


def test_a_format_without_a_rate_has_that_of_a_named_neighbour():
    rates = HardwareProfile.named("rtx4090-ddr5").cpu_linear_bytes_per_s

    assert {name: rates.stands_for(name) for name in ("q4", "q4_k", "q6_k", "fp16", "q4_k*12+q6_k*4")} == {
        "q4": "q4",
        "q4_k": "q4",
        "q6_k": "q8",
        "fp16": "bf16",
        "q4_k*12+q6_k*4": "q4",
    }
    assert rates.of("q6_k") == rates.q8
    assert rates.borrowed(("q8", "q6_k")) == {"q6_k": "q8"}
    with pytest.raises(ValueError, match="no rate for weight format 'q9'; known: fp32, bf16"):
        rates.of("q9")


def test_a_rate_of_a_format_that_does_not_exist_is_refused_with_the_nearest():
    values = catalogue_values()
    values["cpu_ops_per_s"] |= {"q6k": 1e9}

    with pytest.raises(ValueError, match="cpu_ops_per_s: 'q6k' is no weight format; did you mean 'q6_k'"):
        HardwareProfile.from_dict(values)
    values["cpu_ops_per_s"] = values["cpu_ops_per_s"] | {"q6_k": 0}
    del values["cpu_ops_per_s"]["q6k"]
    with pytest.raises(ValueError, match="cpu_ops_per_s.q6_k must be positive"):
        HardwareProfile.from_dict(values)


def test_missing_fields_are_named():
    values = catalogue_values()
    del values["cores"]

    with pytest.raises(ValueError, match="missing cores"):
        HardwareProfile.from_dict(values)


def test_json_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        HardwareProfile.from_json("[]")


def test_a_hardware_file_is_json_or_yaml_alike(tmp_path):
    """A copy of a catalogue file is named by its file; what is no profile is refused with its path. The last of two
    keys counted, `no` for true or false, and 1:30 for 90, and a key that is a number was a TypeError."""
    known = HardwareProfile.named("rtx4090-ddr5")
    (tmp_path / "mine.json").write_text(known.to_json(), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text((CATALOGUE / "rtx4090-ddr5.yaml").read_text(encoding="utf-8"), encoding="utf-8")

    (tmp_path / "written.yml").write_text(known.to_yaml(), encoding="utf-8")

    assert (
        HardwareProfile.from_file(tmp_path / "mine.json")
        == HardwareProfile.from_file(tmp_path / "written.yml")
        == known
    )
    assert HardwareProfile.from_file(str(tmp_path / "mine.yaml")) == replace(known, name="mine")
    for text, words in (
        ("[1, 2]", "expected a mapping"),
        ("a: [", "neither JSON nor YAML"),
        ("cores: 3\n", "missing source"),
        ("[" * 100_000, "nested deeper than 32"),
        ("name: &a there\nsource: *a\n", "1:7: .*anchors are not allowed"),
        ("name: *a\n", "1:7: .*aliases are not allowed"),
        ("cores: 3\ncores: 4\n", "2:1: cores: the key is given twice"),
        ("cpu_ops_per_s: {fp32: 1, fp32: 2}\n", "1:26: cpu_ops_per_s.fp32: the key is given twice"),
        ("1: 2\n", "unknown field '1'"),
        (known.to_yaml() + "---\n", "a second document"),
        (known.to_yaml().replace("unified_memory: false", "unified_memory: no"), "must be true or false, got 'no'"),
        (known.to_yaml().replace("cores: 16", "cores: 1:30"), "cores must be a number, got '1:30'"),
    ):
        (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"bad.yaml.*{words}"):
            HardwareProfile.from_file(tmp_path / "bad.yaml")


def test_a_hardware_file_of_windows_is_read(tmp_path):
    known = HardwareProfile.named("rtx4090-ddr5")
    file = tmp_path / "there.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + known.to_yaml().replace("\n", "\r\n").encode())

    assert HardwareProfile.from_file(file) == known


def test_a_hardware_file_that_doubles_itself_ends_at_once(tmp_path):
    """Its fingerprint became text, of four billion words."""
    doubled = ", ".join(f"k{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 32))
    text = HardwareProfile.named("generic-cpu").to_yaml()
    (tmp_path / "there.yaml").write_text(text.replace("fingerprint: {}", f"fingerprint: {{k0: &a0 x, {doubled}}}"))

    with pytest.raises(ValueError, match="anchors are not allowed"):
        HardwareProfile.from_file(tmp_path / "there.yaml")
