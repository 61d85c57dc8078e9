"""The three lanes and what passes between them: streams, events, page-locked buffers, the host worker."""
