"""Serves an LLM on vLLM over gRPC, with per-request activation steering and hidden-state capture.

Importing this package imports nothing else. Only `engine` needs vLLM, and only `hf` needs transformers.

core        types and their rules
wire        types to protobuf messages and back; the generated stubs
shm         shared-memory segments and their budget
ops         the maths: programs, plans and kernels
formats     files of steering, vectors and captured rows
runtime     what every backend and client shares
testing     a backend without a model
engine      the vLLM backend
hf          the transformers backend, for training
directions  finding and judging directions on any backend
server      the gRPC server around any backend
cli         the `steer` command
"""
