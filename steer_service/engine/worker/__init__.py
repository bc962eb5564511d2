"""Inside vLLM's worker processes: which rows of each step belong to whom, and what is done to them.

worker           vLLM's worker with steering: one engine step from its schedule to its marks
batch_rows       which rows of a step belong to which request, for vLLM's V1 and V2 runners
layer_outputs    what the decoder layers of each model family return
hooks            the call after each decoder layer, and what the worker asks of a device
hooks_cpu        hooks that run while the layers run
hooks_cuda       hooks that are queued on the device
in_flight_steps  forward passes that the device has not completed yet
kv_zeroing       zeroes the KV blocks of rows that were not finite
self_test        proves on the loaded model that steering and capture are right
dummy_run        forward passes on made-up rows, for the self-test
trace            a log of what each step did to which rows
"""
