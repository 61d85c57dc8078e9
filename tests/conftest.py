"""Settings of the whole suite."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell starts background work with Ctrl-C ignored, and processes inherit that: tests that send it would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
