"""The page at `/`: its files, and what they ask: where the model's bytes are, what the lanes do, other budgets."""
