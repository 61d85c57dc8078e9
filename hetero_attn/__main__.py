"""`python -m hetero_attn` is the `hetero-attn` command."""

from hetero_attn.cli import main

if __name__ == "__main__":
    main()
