"""hetero_attn: language models that do not fit in GPU memory, run on GPU, PCIe and CPU cores at the same time.

    from hetero_attn import LLM, SamplingParams
    llm = LLM("path/or/hub-id", gpu_memory="8GiB")
    print(llm.plan.table())
    print(llm.generate("Once upon a time", SamplingParams(max_tokens=64, temperature=0.0))[0].text)

Names are imported when they are first used, so that `import hetero_attn` costs nothing.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetero_attn.engine.measure import profile_machine as profile_machine
    from hetero_attn.errors import HeteroError as HeteroError
    from hetero_attn.llm import LLM as LLM
    from hetero_attn.planning.settle import plan_model as plan_model
    from hetero_attn.serving.request import Metrics as Metrics
    from hetero_attn.serving.request import Piece as Piece
    from hetero_attn.serving.request import Request as Request
    from hetero_attn.serving.request import RequestOutput as RequestOutput
    from hetero_attn.serving.sampling_params import SamplingParams as SamplingParams
    from placement import HardwareProfile as HardwareProfile
    from placement import Plan as Plan
    from placement import Policy as Policy
    from placement import make_plan as make_plan

_HOMES = {
    "LLM": "hetero_attn.llm",
    "SamplingParams": "hetero_attn.serving.sampling_params",
    "RequestOutput": "hetero_attn.serving.request",
    "Piece": "hetero_attn.serving.request",
    "Request": "hetero_attn.serving.request",
    "Metrics": "hetero_attn.serving.request",
    "HeteroError": "hetero_attn.errors",
    "plan_model": "hetero_attn.planning.settle",
    "profile_machine": "hetero_attn.engine.measure",
    "Policy": "placement",
    "Plan": "placement",
    "HardwareProfile": "placement",
    "make_plan": "placement",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    if _HOMES[name] not in sys.modules:
        from hetero_attn.errors import check_neighbours

        check_neighbours()
    return getattr(import_module(_HOMES[name]), name)


def _version() -> str:
    """The installed version; "0+sources" where nothing is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hetero-attn")
    except PackageNotFoundError:
        return "0+sources"


def __dir__() -> list[str]:
    return __all__
