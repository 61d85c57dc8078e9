"""Seed-OSS: Llama whose qkv and o have biases of their own switches."""

from hetero_attn.spec.families.family import Family, GgufTerms

SEED_OSS = Family(
    "SeedOssForCausalLM",
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    o_bias="attention_out_bias",
    mlp_bias="mlp_bias",
    gguf=GgufTerms("seed_oss", parts=(("post_attention_norm", "mlp_norm"),)),
)
