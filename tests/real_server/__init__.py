"""Tests of `steer serve` on the bundled model, on real vLLM, through real clients and real gRPC."""
