"""GPUs that are none: fakes, simulations, and Triton without a device."""
