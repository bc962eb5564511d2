"""The fast lane: shared-memory segments that the server creates and the workers write."""
