"""What answers that were computed in other ways are held to."""

import pytest


def same_answers(outputs, others):
    """Assert equal tokens, texts, reasons to end and, but for rounding, log-probabilities."""
    for output, other in zip(outputs, others, strict=True):
        assert (output.token_ids, output.text, output.finish_reason) == (
            other.token_ids,
            other.text,
            other.finish_reason,
        )
        own, right = output.logprobs or (), other.logprobs or ()
        assert [each.token_id for each in own] == [each.token_id for each in right]
        assert [each.logprob for each in own] == pytest.approx([each.logprob for each in right], abs=1e-4)
