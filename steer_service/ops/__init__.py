"""The maths of steering.

program      a spec compiled to one primitive on unit directions
plan         what one engine step does to which rows
reference    the truth: plain, differentiable torch
cpu_kernel   the kernel for CPUs, in Numba
cuda_tables  the tables that the GPU kernel reads, and the rows that it stages
cuda_kernel  the kernel for GPUs, in Triton
copy_stream  copies between device and host on a CUDA stream of their own
"""
