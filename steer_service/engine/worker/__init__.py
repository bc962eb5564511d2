"""Inside vLLM's worker processes: which rows of each step belong to whom, and how they are steered and captured.

worker           vLLM's worker with steering, and a diagram of one step
worker_state     everything one worker knows about steering, and the course of one step
facts            the model as one worker holds it, and the worker's place among the others
requests         the steered and captured requests that this worker runs
batch_rows       which rows of a step belong to which request, for vLLM's V1 and V2 runners
bank             the programs of one worker, in the tables that the kernel reads
layer_outputs    what the decoder layers of each model family return
hooks            the call after each decoder layer, and what the worker asks of a device
hooks_cpu        hooks that run while the layers run
hooks_cuda       hooks that are queued on the device
row_marks        marks in each request's region what was done to its rows
in_flight_steps  forward passes that the device has not completed yet
kv_zeroing       zeroes the KV blocks of rows that were not finite
self_test        proves on the loaded model that steering and capture are right
dummy_run        forward passes on made-up rows, for the self-test
trace            a log of what each step did to which rows
"""
