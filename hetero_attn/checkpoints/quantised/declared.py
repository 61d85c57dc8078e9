"""How a quantised model would be held, by its config alone: for a plan of a model whose weights are not here.

With files their tensors say it. A config says as much where all of its linears are quantised in one way that it names:
MXFP4, NF4, FP8, and four or eight bits of AWQ or GPTQ. Expressions of strangers are not run, here neither.
"""

from fnmatch import fnmatchcase
from pathlib import Path

from cpu_kernels.formats import FP8_TYPE, FP8_TYPES, INT4_GROUPS, INT4_TYPES, NF4_TYPE, SOURCE_TYPES, UINT8_TYPES
from hetero_attn.checkpoints.files import INDEX_NAME, SINGLE_NAME
from hetero_attn.checkpoints.quantised.scheme import GroupScheme, Scheme
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.model import model_spec
from hetero_attn.spec.weight_formats import WeightFormats

ONE_FORMAT = {"mxfp4": SOURCE_TYPES["MXFP4"].format, "bitsandbytes": NF4_TYPE.format, "fbgemm_fp8": FP8_TYPE.format}
EXPRESSION = "re:"  # begins a name that is an expression


def has_weight_files(path: Path) -> bool:
    """Whether a model directory holds safetensors, or an index that names them."""
    return (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists()


def declared_formats(scheme: Scheme, config: ModelConfig) -> WeightFormats | None:
    """The formats of a model by its config; None where that leaves one of them open."""
    names = {_format(group) for group in scheme.groups}
    if len(names) > 1 or None in names or any(name.startswith(EXPRESSION) for name in scheme.ignore):
        return None
    plain, quantised = config.dtype or "bf16", names.pop()
    assert quantised is not None
    linears = (linear for linear in model_spec(config).linears if linear.kind != "head")
    by_tensor = {
        tensor: plain if _is_ignored(tensor, scheme.ignore) else quantised
        for linear in linears
        for tensor in linear.tensors
    }
    return WeightFormats(plain, plain, by_tensor)


def _format(group: GroupScheme) -> str | None:
    """The format that holds one way of quantising, as the readers of its tensors choose it."""
    if group.method in ONE_FORMAT:
        return ONE_FORMAT[group.method]
    if group.method == "fp8":
        wide = group.block[1] if group.block else FP8_TYPE.items
        return next((FP8_TYPES[each].format for each in sorted(FP8_TYPES, reverse=True) if wide % each == 0), None)
    if group.method not in ("awq", "gptq") or not group.group:
        return None
    if group.bits == 8 and group.symmetric:
        return SOURCE_TYPES["Q8_0"].format
    types = INT4_TYPES if group.bits == 4 else UINT8_TYPES
    return next((types[each].format for each in reversed(INT4_GROUPS) if group.group % each == 0), None)


def _is_ignored(tensor: str, ignored: tuple[str, ...]) -> bool:
    """Whether a name or a glob of the list is that of the tensor's module or of one around it."""
    parts = tensor.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(fnmatchcase(module, name) for name in ignored for module in modules)
