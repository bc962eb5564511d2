"""Extends vLLM's own behaviour, on instances or in vLLM's own processes: other engines in the process are unchanged.

scheduler          limits the rows of a request that may come from the prefix cache
parent_watchdog    ends vLLM's processes once the API server process is gone
quick_end          ends vLLM's processes without Python's teardown
constraint_budget  ends a request whose constraint makes the steps of all requests slow
cpu_generator_fix  keeps seeded sampling repeatable on a CPU
contained_outputs  lets an error in one request's output fail that request alone
end_tokens         keeps end-of-sequence tokens that the model does not have from the workers
response_ring      bounds the ring through which a worker sends its results
compat             names that differ between the supported versions of vLLM
"""
