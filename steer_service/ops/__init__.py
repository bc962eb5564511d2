"""The maths of steering.

program       a spec compiled to one primitive operation on unit directions
plan          the rows that one engine step steers and captures
reference     plain, differentiable torch, with which all else is compared
truth         what operations do to rows, in float64, and how far a kernel may be off
stream_check  what the kernels count on in the tensors of a layer
cpu_kernel    the kernel for CPUs, in Numba
kernel_cache  where the compiled kernel is kept
cpu_step      the CPU kernel for one step: a plan, a bank and a dtype
cuda_tables   the tables that the GPU kernel reads, and the rows that it stages
cuda_kernel   the kernel for GPUs, in Triton
pinned_ring   the memory of the host to which they are copied
copy_stream   copies from device to host on a CUDA stream of their own
"""
