"""How a quantised model would be held, by its config alone: for a plan of a model whose weights are not here.

With files their tensors say it. A config says as much where all of its linears are quantised in one way that it names:
MXFP4, NF4, FP8, and four or eight bits of AWQ or GPTQ. Expressions of strangers are not run, here neither.
"""

from fnmatch import fnmatchcase

from cpu_kernels.formats import FP8_TYPE, NF4_TYPE, SOURCE_TYPES
from hetero_attn.checkpoints.quantised.bytes import form_of_blocks
from hetero_attn.checkpoints.quantised.int4 import form_of_groups
from hetero_attn.checkpoints.quantised.scheme import GroupScheme, Scheme
from hetero_attn.spec.config import ModelConfig
from hetero_attn.spec.decoder.model import model_spec
from hetero_attn.spec.weight_formats import WeightFormats

ONE_FORMAT = {"mxfp4": SOURCE_TYPES["MXFP4"].format, "bitsandbytes": NF4_TYPE.format, "fbgemm_fp8": FP8_TYPE.format}
EXPRESSION = "re:"  # begins a name that is an expression


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
    """The format that holds one way of quantising, by the readers of its tensors; None where those tell."""
    if group.method in ONE_FORMAT:
        return ONE_FORMAT[group.method]
    if group.method == "fp8":
        held = form_of_blocks(group.block[1]) if group.block else FP8_TYPE
    else:
        held = form_of_groups(group, group.group) if group.method in ("awq", "gptq") and group.group else None
    return None if held is None else held.format


def _is_ignored(tensor: str, ignored: tuple[str, ...]) -> bool:
    """Whether a name or a glob of the list is that of the tensor's module or of one around it."""
    parts = tensor.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(fnmatchcase(module, name) for name in ignored for module in modules)
