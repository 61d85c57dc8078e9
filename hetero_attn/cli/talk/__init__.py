"""What `hetero-attn chat` is made of: the conversation, its commands, where lines come from, where words break."""
