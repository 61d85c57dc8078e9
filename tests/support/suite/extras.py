"""Packages of extras that whole folders of tests need."""

import importlib.util

MISSING_OF_SERVER = [
    name for name in ("starlette", "uvicorn", "prometheus_client", "httpx") if importlib.util.find_spec(name) is None
]
