"""Types and their rules; standard library and NumPy only.

specs             SteeringSpec and its operations
positions         which token positions a spec or a capture is for
capture           CaptureSpec, and rows when they have come
prompt            text, token ids or a conversation
sampling_options  how tokens are chosen and when to stop
request           GenerateRequest
row_selection     which rows of an output are steered and captured
events            what a backend answers, in order
stored_capture    captured rows that stay somewhere until they are released
backend           what every backend is, and facts about its model
checks            a request checked against a model
errors            SteerError and its kinds
field_checks      checks of single fields
arrays            vectors, dtypes and their names
layer_paths       where models keep their decoder layers
mapping           memory-mapped files
processes         how processes ended
environment       environment variables, and warnings about unknown ones
"""
