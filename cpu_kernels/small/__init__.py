"""Norms, the gated activation, the merge of partial attention, and reading or writing plain memory."""
