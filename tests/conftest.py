"""Settings of the whole suite."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
