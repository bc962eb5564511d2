"""Hypothesis strategies for the words that travel."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from steer_service.core.arrays import DTYPES
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import (
    CaptureDelivery,
    CaptureSite,
    CaptureSpec,
    MessageBoundary,
    Pooling,
    RowLabels,
    SharedMemoryFallback,
)
from steer_service.core.events import (
    CaptureBlock,
    CaptureLabels,
    Completed,
    FinishReason,
    OutputFinished,
    PromptLogprobs,
    Receipt,
    Started,
    TokenDelta,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from steer_service.core.layer_change import LayerChange
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.prompt import RENDERER_KEYS, ChatMessage, ChatPrompt, TextPrompt, TokenPrompt, ToolCall
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import OPEN_END, spans_of
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.core.structured_outputs import StructuredOutputs
from steer_service.wire.blocks import Lease
from steer_service.wire.stored_capture import StoredCaptureNotice

counts = st.integers(0, 2**31 - 1)
tokens = counts
numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
layers = counts

vectors = npst.arrays(
    np.float32, st.integers(1, 12), elements=st.floats(1.0, 2.0, width=32).map(lambda x: x * (-1) ** int(x * 1000))
)
bounds = st.tuples(numbers, numbers).map(sorted)
_operations = st.one_of(
    st.builds(AddSpec, vector=vectors, scale=numbers),
    st.builds(AblationSpec, vector=vectors, scale=numbers),
    st.builds(lambda vector, pair: ProjectionCapSpec(vector=vector, min=pair[0], max=pair[1]), vectors, bounds),
    st.builds(lambda vector, low: ProjectionCapSpec(vector=vector, min=low), vectors, numbers),
    st.builds(lambda vector, high: ProjectionCapSpec(vector=vector, max=high), vectors, numbers),
)
places = st.integers(-OPEN_END, OPEN_END - 1) | st.integers(-20, 20)
position_ranges = st.one_of(
    st.builds(PositionRange, first=places),
    st.tuples(places, places).map(sorted).map(lambda pair: PositionRange(*pair)),
    st.builds(PositionRange, first=st.integers(0, 20), last=st.integers(-20, -1)),
)
forward = st.integers(0, OPEN_END - 1) | st.integers(0, 20)
generated_ranges = st.builds(PositionRange, forward) | st.tuples(forward, forward).map(sorted).map(
    lambda pair: PositionRange(*pair)
)
scopes = (
    st.fixed_dictionaries(
        {
            "prompt": st.booleans(),
            "generated": st.booleans(),
            "skip_special_tokens": st.booleans(),
            "ranges": st.lists(position_ranges, max_size=4),
            "generated_ranges": st.lists(generated_ranges, max_size=3),
            "messages": st.lists(st.integers(-4096, 4095), max_size=3),
            "roles": st.lists(texts.filter(bool), max_size=2),
        }
    )
    .filter(lambda fields: any(fields.values()))
    .map(lambda fields: PositionScope(**fields))
)
_scaled = _operations | st.builds(AddSpec, vector=vectors, scale=numbers, scaling=st.just("relative"))
operations = st.builds(
    replace,
    _scaled,
    positions=st.none() | st.none() | scopes,
    max_relative_change=st.none() | st.floats(1e-6, 1e6),
    keep_norm=st.booleans(),
)
steering_specs = st.builds(
    SteeringSpec,
    layers=st.dictionaries(
        layers, st.builds(LayerSteeringSpec, operations=st.lists(operations, max_size=4).map(tuple)), max_size=4
    ),
    positions=st.none() | scopes,
    report_change=st.booleans(),
)
deliveries = st.tuples(st.sampled_from(CaptureDelivery), st.just(False), st.sampled_from(Pooling)) | st.just(
    (CaptureDelivery.INLINE, True, Pooling.NONE)
)
"""(how, is it live?, how is it pooled?)."""
capture_specs = st.builds(
    lambda delivery, **fields: CaptureSpec(delivery=delivery[0], is_live=delivery[1], pooling=delivery[2], **fields),
    delivery=deliveries,
    layers=st.lists(layers, max_size=5).map(tuple),
    site=st.sampled_from(CaptureSite),
    positions=st.none() | scopes,
    dtype=st.none() | st.sampled_from(sorted(DTYPES)),
    max_chunk_bytes=st.none() | st.integers(4096, 1 << 20),
    shared_memory_session=st.binary(max_size=40),
    release_token=st.just(b"") | st.binary(min_size=16, max_size=64),
)
_unconstrained = st.builds(
    SamplingOptions,
    n=st.none() | st.integers(1, 8),
    max_tokens=st.none() | st.integers(10, 2**31 - 1),
    min_tokens=st.none() | st.integers(0, 10),
    temperature=st.none() | st.floats(0, 100),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    top_k=st.none() | counts,
    min_p=st.none() | st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    presence_penalty=st.none() | st.floats(-2, 2),
    frequency_penalty=st.none() | st.floats(-2, 2),
    repetition_penalty=st.none() | st.floats(0, 2, exclude_min=True),
    ignore_eos=st.none() | st.booleans(),
    skip_special_tokens=st.none() | st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    stop=st.lists(texts.filter(bool), max_size=3).map(tuple),
    stop_token_ids=st.lists(tokens, max_size=3).map(tuple),
    include_stop=st.none() | st.booleans(),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100), max_size=3),
    bad_words=st.lists(texts.filter(bool), max_size=3).map(tuple),
    allowed_token_ids=st.none() | st.lists(tokens, min_size=1, max_size=3).map(tuple),
)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | numbers | texts, st.lists, max_leaves=4)
json_objects = st.dictionaries(texts, json_values, max_size=3)
_words = texts.filter(bool).filter(lambda text: "\0" not in text)
constraints = st.one_of(
    st.builds(StructuredOutputs, json=json_objects),
    st.builds(StructuredOutputs, regex=_words),
    st.builds(StructuredOutputs, grammar=_words),
    st.builds(StructuredOutputs, choice=st.lists(_words, min_size=1, max_size=3).map(tuple)),
)
sampling_options = _unconstrained | st.builds(
    replace, _unconstrained, ignore_eos=st.sampled_from([None, False]), structured_outputs=constraints
)
chat_messages = st.builds(
    ChatMessage,
    role=texts.filter(bool),
    content=texts,
    name=texts,
    tool_calls=st.lists(st.builds(ToolCall, name=texts.filter(bool), arguments=json_objects, id=texts), max_size=2).map(
        tuple
    ),
    tool_call_id=texts,
    reasoning_content=texts,
)
ends_of_chats = st.sampled_from([(False, None), (False, False), (False, True), (True, None), (True, False)])
"""(continue_final_message, add_generation_prompt)."""
chat_prompts = st.builds(
    lambda messages, end, **fields: ChatPrompt(
        messages=(*messages, ChatMessage(role="assistant", content="so")),
        continue_final_message=end[0],
        add_generation_prompt=end[1],
        **fields,
    ),
    st.lists(chat_messages, max_size=3),
    ends_of_chats,
    chat_template_kwargs=json_objects.filter(
        lambda given: not any(key in RENDERER_KEYS or key.startswith("return_") for key in given)
    ),
    tools=st.lists(json_objects, max_size=2).map(tuple),
)
prompts = st.one_of(
    st.builds(TextPrompt, text=texts.filter(bool), add_special_tokens=st.booleans()),
    st.builds(TokenPrompt, token_ids=st.lists(tokens, min_size=1, max_size=8).map(tuple)),
    chat_prompts,
)
requests = st.builds(
    GenerateRequest,
    prompt=prompts,
    sampling=sampling_options,
    steering=st.none() | steering_specs,
    capture=st.none() | capture_specs,
    request_id=st.from_regex(r"[A-Za-z0-9._:-]{0,20}", fullmatch=True),
    model=texts,
    cache_salt=texts,
    priority=st.none() | st.integers(-(2**31), 2**31 - 1),
    stream_interval=st.none() | st.integers(0, 2**31 - 1),
    truncate_prompt_tokens=st.none() | st.just(-1) | st.integers(1, 2**31 - 1),
    time_budget_s=st.none() | st.integers(1, 86_400 * 10**3).map(lambda milliseconds: milliseconds / 1000),
)
sizes = (
    "layer_count",
    "hidden_size",
    "vocab_size",
    "max_model_len",
    "max_programs",
    "max_operations",
    "max_operations_per_layer",
    "max_prompt_tokens",
)
model_infos = st.builds(
    ModelInfo,
    name=texts,
    architecture=texts,
    dtype=st.sampled_from(sorted(DTYPES)),
    adapters=st.lists(texts, max_size=3).map(tuple),
    aliases=st.lists(texts, max_size=3).map(tuple),
    special_token_ids=st.lists(counts, max_size=3).map(tuple),
    has_chat_template=st.booleans(),
    **dict.fromkeys(sizes, counts),
)

boundaries = st.builds(MessageBoundary, texts, texts, counts, counts)
started_events = st.builds(
    Started,
    request_id=texts,
    prompt_token_ids=st.lists(tokens, max_size=5).map(tuple),
    sampling=sampling_options,
    message_boundaries=st.lists(boundaries, max_size=2).map(tuple),
    capture_delivery=st.none() | st.sampled_from(CaptureDelivery),
    shared_memory_fallback=st.none() | st.sampled_from(SharedMemoryFallback),
    vectors_stored=st.booleans(),
    generation_config=texts,
    boundaries_missing_reason=texts,
)
logprobs = st.builds(
    TokenLogprob,
    token_id=tokens,
    logprob=numbers,
    top=st.lists(st.builds(TopLogprob, tokens, numbers, texts, counts), max_size=2).map(tuple),
    text=texts,
    rank=counts,
)
prompt_logprobs = st.builds(
    PromptLogprobs,
    first_position=st.integers(1, 10**6),
    logprobs=st.lists(logprobs, min_size=1, max_size=4).map(tuple),
)
deltas = st.builds(
    TokenDelta,
    output_index=st.integers(0, 7),
    text=texts,
    token_ids=st.lists(tokens, max_size=3).map(tuple),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
)
receipts = st.builds(
    Receipt,
    steering_digest=st.just("") | st.binary(min_size=32, max_size=32).map(bytes.hex),
    steered_layers=st.lists(layers, max_size=3).map(tuple),
    rows_steered=counts,
    captured_layers=st.lists(layers, max_size=3).map(tuple),
    rows_captured=counts,
    rows_from_prefix_cache=counts,
    rows_total=counts,
    bytes_reserved=st.integers(0, 2**64 - 1),
    bytes_captured=st.integers(0, 2**64 - 1),
    changes=st.lists(
        st.builds(LayerChange, layer=layers, positions=counts, largest=numbers, mean=numbers, capped_positions=counts),
        max_size=3,
    ).map(tuple),
)
finished_events = st.builds(
    OutputFinished,
    output_index=st.integers(0, 7),
    reason=st.sampled_from([reason for reason in FinishReason if reason is not FinishReason.OTHER]),
    stop=st.none() | texts | tokens,
    receipt=receipts,
)
completed_events = st.builds(
    Completed, usage=st.builds(Usage, prompt_tokens=counts, completion_tokens=counts, cached_tokens=counts)
)


sets_of_positions = st.sets(st.integers(0, 40) | st.integers(0, OPEN_END - 2), max_size=20).map(
    lambda positions: np.array(sorted(positions), dtype=np.int32)
)


@st.composite
def capture_labels(draw: st.DrawFn) -> CaptureLabels:
    positions = draw(sets_of_positions)
    flags = st.lists(st.booleans(), min_size=len(positions), max_size=len(positions))
    labels = RowLabels(
        positions=positions,
        token_ids=draw(st.lists(tokens, min_size=len(positions), max_size=len(positions))),
        is_generated=draw(flags),
        is_steered=draw(flags),
    )
    return CaptureLabels(output_index=draw(st.integers(0, 7)), labels=labels)


@st.composite
def capture_blocks(draw: st.DrawFn) -> CaptureBlock:
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    positions, pooling = draw(sets_of_positions), draw(st.sampled_from(Pooling))
    shape = (pooling.row_count(len(positions)), draw(st.integers(1, 20)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return CaptureBlock(
        output_index=draw(st.integers(0, 7)),
        layer=draw(layers),
        site=draw(st.sampled_from(CaptureSite.BOTH.parts)),
        spans=spans_of(positions),
        hidden=rng.standard_normal(shape).astype(dtype),
        pooling=pooling,
    )


times = st.integers(0, 10**13).map(lambda milliseconds: milliseconds / 1000)
held_facts = st.builds(
    CaptureMetadata,
    layers=st.lists(layers, unique=True, max_size=4).map(tuple),
    sites=st.sampled_from(CaptureSite).map(lambda site: site.parts),
    spans=sets_of_positions.map(spans_of),
    dtype=st.sampled_from(sorted(DTYPES)),
    hidden_size=counts,
    prompt_tokens=counts,
    sequence_rows=counts,
    pooling=st.sampled_from(Pooling),
)
held_notices = st.builds(
    StoredCaptureNotice,
    capture_id=texts,
    output_index=st.integers(0, 7),
    metadata=held_facts,
    expires_at=times,
    expires_in_s=times,
)
leases = st.builds(
    Lease,
    token=st.binary(min_size=1, max_size=40),
    segment_name=texts.filter(bool),
    expires_at=times,
    expires_in_s=times,
)
offsets = st.integers(0, 2**57).map(lambda number: 64 * number)
