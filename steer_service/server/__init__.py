"""The gRPC server around any backend.

app                     SteerServer: all services on one address, from loading to the last drained request
config                  the server's settings and their environment variables
supervisor              starts the engine, and starts it again when it dies
quarantine              finds the request that kills the engine
bind                    addresses to listen on, and whether they are free
event_loop              the event loop that it runs in
tokens                  the file of bearer tokens, by their hashes
authentication          refuses calls without a valid token, before their message is read
certificates            TLS: the server's certificate and the authority of its clients'
reloaded                what was read from files, read again when they change
callers                 who a call comes from, and what belongs to whom
request_body            the bytes of a request, until they are read
admission               the table of running requests, and the reasons to refuse another
fair_queue              the bounded queue in front of the engine, fair between clients
generation_servicer     Generate and Cancel
response_writer         writes the events of one Generate call as responses
vector_servicer         UploadVector, GetVector, ListVectors and DeleteVector
capture_servicer        FetchCapture, ReleaseCapture, OpenSharedMemory and ConfirmSharedMemory
tokenizer_servicer      Tokenize, Detokenize and Render
info_servicer           GetServerInfo and GetModel
health                  health checks: what they say, and the service beside all others
health_listener         health checks on an address and in a thread of their own
services                registers the servicers and reflection with gRPC
capture_store           captures kept until their client releases them or they expire
vector_store            vectors kept for their client, by digest
shared_memory_sessions  which clients have proven that they share this host's memory
heartbeats              heartbeats on response streams on which nothing else is sent
slow_readers            ends response streams whose client has stopped reading
trusted_proxy           which peers are proxies whose word about their clients counts
client_limits           how much one client may have at once
client_streams          how many response streams of one kind a client has open
call_end                ends a call with a status from another task
instance                the server's name among those behind a balancer, and its ids
late_reading            handlers that decide about a call before they read its message
call_record             what is noted of a call, for its log line and its span; metadata of its response
call_log                the log line of each call
error_counts            how many calls ended with which error
tracing                 spans for OpenTelemetry; imported by servers that trace alone
trace_endpoint          where spans are sent: a flag, or OpenTelemetry's variables
metrics                 the server's own series for Prometheus
state_series            series of the server's state: engine, bank, shared memory, captures, vectors, certificates
token_latency           the histogram of times between tokens
engine_series           vLLM's series, with the requests in the server's queue
http_listener           the HTTP port: metrics and probes
pulse                   whether the event loop still runs
aborted_calls           goes around every handler: errors become statuses, and each call leaves a log line
"""
