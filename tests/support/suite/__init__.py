"""What the suite itself is made of."""
