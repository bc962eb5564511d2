"""Tests of what is in `deploy/` for operators."""
