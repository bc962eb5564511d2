"""What every backend and client shares: the calls of users, and the preparation and checking of requests.

calls               generate, chat, stream and stream_events over any backend's `submit`
call_options        their keywords, and the requests that a call makes of them
stream_events       the events of a request, with a handle for the captures of each output
deadline            calls and iterators that end when their caller's time is over
backend_facts       what every backend says about itself
many_prompts        many requests of one call: bounded, retried, with progress and partial results
together            coroutines that run at the same time, of which the first error ends the others
places              how many requests of one call are in flight
prompt_progress     the progress of a call with many prompts
retry               which errors a call is repeated after, when, and for how long
results             what the calls return, assembled from events
handle              CaptureHandle: fetching and releasing captured rows
prepare             a request checked against the model, its prompt rendered, its positions resolved
time_budget         the time that a request has for generation
output_events       the events of a request, written once for every backend
pooling             one row of all captured rows of an output
output_text         the text of an output, piece by piece, up to its stop string
detokenizer         the text that generated tokens add to a prompt
token_texts         the text of a model's tokens
tokenizer_calls     tokenize, detokenize and render, the calls that show prompts
prompt_reader       shows prompts as the model gets them
prompt_renderer     renders prompts without blocking the event loop
prompts             a prompt rendered to token ids
prompt_tail         the last tokens of a prompt
second_bos          a hint about a BOS token that is there twice
bad_words           the tokens of words that must not be generated
scoring             the likelihood of given answers
spaced_deltas       fewer and larger TokenDeltas
prompt_length       refuses a text that is too long before all of it is tokenised
conversations       conversations as users write them
chat_template       a conversation rendered by a model's own template
chat_defaults       the template and its arguments that an operator chooses
chat_lines          prompts in the lines of files
chat                the tokens of each message of a rendered conversation
chat_marks          the text of each message in a rendered conversation
cache_folders       gives every cache a folder that can be written to
worker_threads      a few threads with a bounded queue
local_capture       captured rows in memory of this process
merge               several iterators as one, and one that starts early
response_validator  the caller's check that a response matches its request
event_loop_thread   an event loop in a thread of its own
process_bound       objects that cannot be pickled or copied
forks               what objects with threads and connections do in a forked process
"""
