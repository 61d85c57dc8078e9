"""NF4 as bitsandbytes itself writes it: the values here are those of its own dequantiser on a CPU, to the bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_attn.checkpoints.loading.numbers import Numbers
from hetero_attn.checkpoints.sources import open_source
from tests.support.kernels.cpu_oracles import kernels
from tests.support.models.toy import make_checkpoint
from tests.support.quantised.int4_models import SHAPE, edit_config
from tests.support.quantised.scaled_cases import BNB

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed (extra test-tools)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_values_are_those_of_their_dequantiser_to_the_bit(tmp_path, nested, dtype):
    """Theirs end in the dtype that the weight had, bfloat16 by a last rounding of float32."""
    folder = make_checkpoint(tmp_path / "theirs", "llama", **SHAPE | {"layers": 1})
    tensors, theirs = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].to(dtype)
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
        theirs[name] = functional.dequantize_4bit(codes, state)
        tensors |= {name: codes, **{f"{name}.{part}": item for part, item in state.as_dict(packed=True).items()}}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=BNB | {"bnb_4bit_use_double_quant": nested})

    assert len(theirs) == 7
    with open_source(folder) as source:
        for name, values in theirs.items():
            assert source.dtype(name) == "nf4" and values.dtype == dtype
            assert torch.equal(Numbers(source, kernels()).matrix(name).to(dtype), values), name
