"""Types and their rules; standard library and NumPy only.

specs             SteeringSpec and its operations
scaled_spec       a spec with other scales
vectors           vectors and numbers of operations, checked
positions         which token positions a spec or a capture is for
spans             the positions that are meant, as spans of one sequence
span_table        long lists of spans as arrays
numbered_scopes   the different positions of a spec's operations
hook_point        what is steered or captured at a decoder layer
prompt_places     where the messages and special tokens of one prompt are
capture           CaptureSpec, captured rows and their labels
prompt            text, token ids or a conversation
prompt_tokens     a prompt as the model gets it, for callers that choose positions
sampling_options  how tokens are chosen and when to stop
request           GenerateRequest
row_selection     which rows of an output are steered and captured
events            what a backend yields for a request, in order
layer_change      how much a layer's operations changed the rows of an output
stored_capture    captured rows that are held until they are released
backend           the interface of every backend, and ModelInfo
usage             how much of its limits a backend uses
checks            a request checked against a model
errors            SteerError and its kinds
number_limits     the least and the most of every number in a request
field_checks      checks of single fields
lazy_mapping      a mapping whose values are made when they are first read
one_line          a repr of data on one line
small_file        reading a file that a person wrote
arrays            vectors, dtypes and their names
layer_paths       where models keep their decoder layers
mapping           memory-mapped files
start_proof       what an engine proved when it started
server_info       what a server says about itself
structured_outputs  constraints of outputs
json_fields       reads JSON objects with known fields
verified_architectures  models whose steering is proven, by name
supported_versions      versions of Python and vLLM
processes         why a process ended
log_lines         log lines: one per event, as text or JSON
cache_folder      the folder of all caches, and whether it can be trusted
setting_rules     the rules of settings that are numbers or words
environment       environment variables, and warnings about unknown ones
"""
