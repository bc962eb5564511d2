"""Inside vLLM's worker processes: steers and captures the rows of each step.

worker           vLLM's worker with steering, and a diagram of one step
worker_state     the steering state of one worker, and the parts of one step
facts            facts about the model on one worker, and the worker's place among the others
requests         the steered and captured requests that this worker runs
batch_rows       which rows of a step belong to which request, for vLLM's V1 and V2 runners
bank             the programs of one worker, in the tables that the kernel reads
layer_outputs    what the decoder layers of each model family return
model_checks     refuses models that differ from their config, or whose layers read more than the residual stream
hooks            the call after each decoder layer, and the interface of a device's hooks
hooks_cpu        hooks that run while the layers run
hooks_cuda       hooks that are queued on the device
row_marks        writes to each request's region what was done to its rows
in_flight_steps  steps that the device has not completed yet
kv_zeroing       zeroes the KV blocks of rows that were not finite
self_test        the proof at start: kernel, then model, on all ranks together
kernel_proof     the proof of the kernel, against float64
model_proof      the proof of the loaded model: the passes of each class of steps
proof_checks     what must be true of these passes
proof_programs   programs in the bank for the time of a proof
device_proof     the proof of a device without a model, for `steer selftest`
devices          which hooks a device has
dispatch         the classes of steps: with one graph, with several, with none
rank_agreement   lets all ranks refuse together
dummy_run        forward passes on made-up rows
replaced_method  replaces a method of one object for a while
trace            a log of what each step did to which rows
"""
