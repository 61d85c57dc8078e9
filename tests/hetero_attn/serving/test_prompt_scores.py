"""Scores of a prompt's tokens: those of all its logits at once, with few rows of log-probabilities at a time."""

import pytest
import torch

from hetero_attn.serving import prompt_scores
from hetero_attn.serving.prompt_scores import PromptScores


@pytest.mark.parametrize("chunks", [[70], [1, 16, 17, 36], [69, 1]], ids=str)
def test_few_rows_of_log_probabilities_exist_at_a_time(monkeypatch, chunks):
    ids = tuple(int(each) for each in torch.randint(50, (70,), generator=torch.Generator().manual_seed(1)))
    logits = torch.randn(70, 50, generator=torch.Generator().manual_seed(2))
    rows, softmax = [], torch.log_softmax
    monkeypatch.setattr(
        prompt_scores.torch, "log_softmax", lambda block, dim: rows.append(len(block)) or softmax(block, dim)
    )
    scores, first = PromptScores(ids, 3), 0
    for count in chunks:
        scores.append(logits[first : first + count])
        first += count
    expected = softmax(logits.double(), 1)

    assert max(rows) <= 16 and sum(rows) == 69
    assert scores.tokens[0] is None and [each.token_id for each in scores.tokens[1:]] == [*ids[1:]]
    for place, entry in enumerate(scores.tokens[1:]):
        assert entry.logprob == pytest.approx(float(expected[place, ids[place + 1]]), abs=1e-12)
        assert [token_id for token_id, _ in entry.top_logprobs] == expected[place].topk(3).indices.tolist()
