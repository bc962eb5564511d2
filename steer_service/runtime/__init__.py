"""What every backend and client shares: the calls users make, and the way of a request through a backend.

calls               generate, chat and stream over any backend's `submit`
results             what the calls return, put together from events
handle              CaptureHandle: what a caller holds of captured rows
prepare             a request checked against the model, its prompt rendered, its positions resolved
output_events       the events of a request, written once for every backend
prompts             a prompt rendered to token ids
chat                a conversation rendered, and where its messages lie
local_capture       captured rows in memory of this process
merge               several event iterators as one
response_validator  the caller's check that a response matches its request
event_loop_thread   an event loop in a thread of its own
"""
