"""The gRPC server around any backend.

app                     SteerServer: all services on one address, from loading to the last drained request
config                  how a server is asked to serve
bind                    addresses
event_loop              which event loop it runs in
admission               how many requests run at once, and which
generation_servicer     Generate and Cancel
response_writer         writes the events of one Generate call as responses
vector_servicer         UploadVector
capture_servicer        FetchCapture, ReleaseCapture and the proof of shared memory
info_servicer           facts about the model and the server
services                registers the servicers' methods
capture_store           captures held for their client
vector_store            vectors held for their client
shared_memory_sessions  which clients share this host's memory
slow_readers            ends response streams whose client does not read
client_id               which client a call comes from
metrics                 what operators can count
status                  errors as gRPC statuses
"""
