"""A backend without a model, for tests of protocols.

fake_backend  a deterministic backend that computes what it captures from positions and tokens
fake_prompts  its prompts, one token per word
"""
