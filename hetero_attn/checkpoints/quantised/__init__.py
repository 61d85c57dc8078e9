"""Safetensors whose linears are quantised: GPTQ, AWQ, compressed-tensors, FP8, ModelOpt and NF4, read exactly."""
