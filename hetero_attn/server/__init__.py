"""The HTTP server: one thread takes the engine's steps, an event loop speaks OpenAI's protocols.

    cli/serve > run > app > protocols > service > driver > LLM

Every protocol translates its body into one `Turn` and what the model says back from the same pieces. Nothing here
computes; nothing below knows of HTTP.
"""
