"""The whole suite. What must stand in the environment before torch is loaded is set here."""

import os

# Threads of torch's pool, of this process and of those that tests start, sleep while they wait for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
