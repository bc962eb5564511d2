"""Serves an LLM on vLLM over gRPC, with per-request activation steering and hidden-state capture.

Importing this package costs nothing: the words live in `steer_service.core` (numpy only), the wire in
`steer_service.wire`, and only `steer_service.engine` needs vLLM.
"""
