"""gRPC around any backend, and the `steer` command."""
