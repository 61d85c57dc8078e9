"""`hetero-attn serve`, which needs the extra `[server]`."""
