"""What a user wishes: the policy file, its checks, and the bounds that its rules set to each shard."""
