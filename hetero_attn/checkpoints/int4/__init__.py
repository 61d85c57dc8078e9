"""Safetensors whose linears are groups of int4 with zero points: GPTQ, AWQ and compressed-tensors, read exactly."""
