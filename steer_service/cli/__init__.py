"""The `steer` command.

main            which subcommand runs; `python -m steer_service.cli` is the same
serve           a server around vLLM until a signal comes
info            the model and the limits of a server
healthcheck     the health of a server, for probes of containers
generate        text from a running server
render          tokens and positions of a prompt, by a running server
capture/        hidden states of many prompts, written to a folder
train           steering out of contrastive prompts
train_advice    what `steer train` advises on its result
vectors/        vectors of other projects: inspected, converted, measured
doctor/         checks of the environment of a server
token           bearer tokens for the clients of a server
demo            what steering does, shown on the bundled model
steering_argument the steering of a request: a document, a folder or a file of vectors
steering_summary  what a steering does, in one line
vector_options  what a file of vectors does not say
prompt_arguments  prompts on the command line
selftest        the proof of steering on a device, without a model
parser          the parser of every command
versions        the versions that `steer --version` prints
start_checks    what `steer serve` refuses before vLLM is imported
server_flags    the flags of `steer serve` that are the server's own
arguments       arguments that several commands share
sampling_arguments  the sampling options on the command line
connection      how commands reach a server: its address and credentials
run_command     how a command parses, runs and ends
exit_status     exit statuses
terminal        standard streams, and text of others on a terminal
model_choice    a model that is loaded here, or a server's
scales          the scales of a sweep
progress        progress on standard error
logs            the log of `steer serve`, and vLLM's lines in the same form
server_process  `steer serve` as a child process
"""
