"""Architectures only: BDH and GPT-2. Knows nothing of files, tokenizers, losses or devices."""
