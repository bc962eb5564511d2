"""Converts core types to protobuf messages and back: a pure `x_to_proto` and `x_from_proto` side by side.

request         GenerateRequest, prompts and sampling options
tokens          requests for the tokens and texts of prompts, and their responses
steering        SteeringSpec and its operations, with vectors inline or named by digest
capture         CaptureSpec, its enums, row labels and boundaries of messages
hook_points     HookPoint
positions       PositionScope and spans of positions
tensors         arrays and dtypes
info            ModelInfo, ServerInfo and StartProof
events          events of a Generate response stream: EventWriter and EventReader
receipts        receipts of what was applied to an output
blocks          captured rows, split into chunks and joined again, and regions of shared memory
chunks          chunks to and from bytes, with fewer copies than protobuf makes
stored_capture  captures held on the server, and the response stream that fetches them
field_paths     layers in the fields of errors, by their entry on the wire and by number in Python
channels        what every channel to a server needs: address, TLS credentials and token
status_codes    SteerErrors and gRPC statuses
connection_problems  what gRPC's texts say about a connection
message_scan    checks the bytes of a request before they are parsed
fields          timestamps, and the errors of missing fields and broken response streams
regenerate      writes the generated modules from proto/steer/v1
proto_files     the folder of the contract's .proto files
*_pb2*          generated messages, their types and service stubs
"""
