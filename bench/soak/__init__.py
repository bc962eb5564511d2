"""The long figures of `docs/reliability.md`: load, abuse and faults against real server and client processes."""
