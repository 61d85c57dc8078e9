"""FP8, int8, MXFP4, NVFP4 and NF4 models, each form of their files by a name."""

import torch

from tests.support.quantised.scaled_models import (
    compressed_config,
    fp8_blocks,
    fp8_channel,
    fp8_tensor,
    int8_channel,
    int8_packed,
    mxfp4,
    nf4,
    nvfp4,
)

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
W8A8 = compressed_config("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel")


# mixed kinds in one layer: what compressed-tensors calls mixed-precision, with its groups of 8 and of 4 bits
MIXED = compressed_config("mixed-precision", num_bits=8, type="float", symmetric=True, strategy="channel")


MIXED["config_groups"]["group_1"] = {
    "targets": ["re:.*down_proj"],
    "weights": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32},
}
MIXED["config_groups"]["group_2"] = {
    "targets": ["re:.*up_proj"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
}

# writers by linear, config, further arguments, the formats that the linears are held in
SCALED_CASES = {
    "fp8 blocks": ({"": fp8_blocks(128, 128)}, BLOCKS, {}, {"fp8"}),
    "fp8 partial blocks": (
        {"": fp8_blocks(128, 128, torch.bfloat16)},
        BLOCKS,
        {"hidden": 192, "num_heads": 6, "num_kv_heads": 2, "intermediate": 320},
        {"fp8"},
    ),
    "fp8 powers of two": (
        {"": fp8_blocks(64, 256, torch.float8_e8m0fnu)},
        BLOCKS | {"weight_block_size": [64, 256], "scale_fmt": "ue8m0"},
        {},
        {"fp8"},
    ),
    "fp8 blocks of 32": ({"": fp8_blocks(32, 32)}, BLOCKS | {"weight_block_size": [32, 32]}, {}, {"fp8_g32"}),
    "fp8 blocks of 64": ({"": fp8_blocks(64, 64)}, BLOCKS | {"weight_block_size": [64, 64]}, {}, {"fp8_g64"}),
    "fp8 high blocks, the last ones partial": (
        {"": fp8_blocks(128, 96, torch.bfloat16)},
        BLOCKS | {"weight_block_size": [128, 96]},
        {"hidden": 192, "num_heads": 6, "num_kv_heads": 2, "intermediate": 320},
        {"fp8_g32"},
    ),
    "fp8 blocks of one row": ({"": fp8_blocks(1, 128)}, BLOCKS | {"weight_block_size": [1, 128]}, {}, {"fp8"}),
    "fp8 narrow blocks": ({"": fp8_blocks(32, 48)}, BLOCKS | {"weight_block_size": [32, 48]}, {}, {"fp32"}),
    "fp8 tensor": ({"": fp8_tensor}, {"quant_method": "modelopt", "quant_algo": "FP8"}, {}, {"fp8"}),
    "fbgemm": ({"": fp8_channel}, {"quant_method": "fbgemm_fp8"}, {}, {"fp8"}),
    "w8a8": ({"": int8_channel}, W8A8, {}, {"int8"}),
    "int8 packed": (
        {"": int8_packed(128)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=True, strategy="group", group_size=128),
        {},
        {"int8"},
    ),
    "int8 packed in narrow groups": (
        {"": int8_packed(32)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=True, strategy="group", group_size=32),
        {},
        {"uint8_g32"},
    ),
    "int8 packed in narrow groups, float32 scales": (
        {"": int8_packed(32, scales=torch.float32)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=True, strategy="group", group_size=32),
        {},
        {"fp32"},
    ),
    "int8 packed with zero points": (
        {"": int8_packed(64, symmetric=False)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="group", group_size=64),
        {},
        {"uint8_g64"},
    ),
    "int8 packed with zero points of wide groups": (
        {"": int8_packed(256, symmetric=False)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="group", group_size=256),
        {"hidden": 256, "num_heads": 8, "num_kv_heads": 2, "intermediate": 512},
        {"uint8_g128"},
    ),
    "int8 packed with zero points and float32 scales": (
        {"": int8_packed(64, symmetric=False, scales=torch.float32)},
        compressed_config("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="group", group_size=64),
        {},
        {"fp32"},
    ),
    "mxfp4": (
        {"": mxfp4},
        compressed_config("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        {},
        {"mxfp4"},
    ),
    "nvfp4": (
        {"": nvfp4(model_opt=False)},
        compressed_config("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        {},
        {"nvfp4"},
    ),
    "modelopt nvfp4": ({"": nvfp4(model_opt=True)}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}, {"nvfp4"}),
    "nf4": ({"": nf4(nested=False)}, BNB, {}, {"nf4"}),
    "nf4 nested": ({"": nf4(nested=True), "k": None}, BNB, {}, {"nf4", "bf16"}),
    "mixed": (
        {"": fp8_channel, "down": mxfp4, "up": int8_packed(128), "v": None, "o": int8_channel},
        MIXED,
        {},
        {"fp8", "bf16", "mxfp4", "int8"},
    ),
}
