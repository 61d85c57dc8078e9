"""What drafts gain on a loaded model: passes of several rows, and answers with drafts beside plain ones."""
