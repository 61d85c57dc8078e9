"""A model and what drafts for it, planned in one search: rows of its passes, where the drafter lives, and the cut."""
