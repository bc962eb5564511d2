"""Where vLLM's own behaviour is extended, on instances only: other engines in the process are untouched.

scheduler          limits how much of a request's prefix may come from the cache
parent_watchdog    ends vLLM's processes after the process that started them
cpu_generator_fix  keeps seeded sampling repeatable on a CPU
compat             names that differ between the supported versions of vLLM
"""
