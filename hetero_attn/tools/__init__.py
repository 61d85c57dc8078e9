"""What examines a model or a machine: benchmark, verification, trace, doctor."""
