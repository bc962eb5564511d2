"""What tests of protocols run against instead of a model.

fake_backend  a deterministic backend that computes what it captures from positions and tokens
"""
