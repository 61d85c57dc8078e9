"""Arguments of public calls: whatever they are, they are taken or refused by name."""
