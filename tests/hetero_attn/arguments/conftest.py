"""A small model, loaded once for every file here."""

from pathlib import Path

import pytest

from hetero_attn import LLM
from tests.support.models.toy import make_checkpoint
from tests.support.planning.wishes import OPTIONS


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("arguments"), "llama", layers=1)


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, progress=False, **OPTIONS) as llm:
        yield llm
