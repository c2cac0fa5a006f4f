"""A Hugging Face causal language model cut in two: former layers at the party, latter layers in the enclave."""
