"""Inside vLLM's worker processes: steers and captures the rows of each step.

worker           vLLM's worker with steering, and a diagram of one step
worker_state     the steering state of one worker, and the parts of one step
facts            facts about the model on one worker, and the worker's place among the others
requests         the steered and captured requests that this worker runs
batch_rows       which rows of a step belong to which request, for vLLM's V1 and V2 runners
bank             the programs of one worker, in the tables that the kernel reads
layer_outputs    what the decoder layers of each model family return
hooks            the call after each decoder layer, and the interface of a device's hooks
hooks_cpu        hooks that run while the layers run
hooks_cuda       hooks that are queued on the device
row_marks        writes to each request's region what was done to its rows
in_flight_steps  steps that the device has not completed yet
kv_zeroing       zeroes the KV blocks of rows that were not finite
self_test        checks on the loaded model that steering and capture are right
dummy_run        forward passes on made-up rows, for the self-test
trace            a log of what each step did to which rows
"""
