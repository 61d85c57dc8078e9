"""The parts of gpu_offload.py: what each measures, one after another, in a process that may end."""
