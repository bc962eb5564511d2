"""All backends on one model, and the requests that each of them must answer alike.

Any new backend is added to `BACKENDS` and must pass.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from steer_client import AsyncSteerClient
from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.events import Receipt
from steer_service.core.positions import PositionRange
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.hf import HFSteeringModel
from steer_service.hf.bundled_model import ensure_bundled_model
from steer_service.runtime.calls import SteeringCalls, checked_events
from steer_service.runtime.conversations import conversation_from
from steer_service.runtime.results import Generation, collect
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.tiny_models import ModelFolder

BACKENDS = ("hf", "engine", "served")
TEXT = "The three of them met at the harbour before sunrise"
GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
PARTS = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "the light?"}]
CALL = {"id": "7", "type": "function", "function": {"name": "tide", "arguments": '{"at": "dawn"}'}}
CALLS = [
    {"role": "user", "name": "Ann", "content": "When is high water?"},
    {"role": "assistant", "content": None, "reasoning_content": "I must ask. ", "tool_calls": [CALL]},
    {"role": "tool", "name": "tide", "tool_call_id": "7", "content": "At six."},
]
RECEIPT = ("steering_digest", "steered_layers", "rows_steered", "captured_layers", "rows_captured", "rows_total")
"""What the receipts of all backends must say alike; the rest is about memory."""
CHANGES = 1e-4
"""Relative difference of reported changes, which are differences of rows."""


@dataclass(frozen=True)
class AllBackends:
    """All backends on one model."""

    hf: HFSteeringModel
    engine: VLLMSteeringModel

    @asynccontextmanager
    async def backends(self) -> AsyncIterator[dict[str, SteeringCalls]]:
        """Name -> backend, the client through a server of its own."""
        server = SteerServer(ServerConfig(address="127.0.0.1:0"))
        address = await server.listen()
        await server.open(Shared(self.engine))
        try:
            async with AsyncSteerClient(address) as client:
                yield dict(zip(BACKENDS, (self.hf, self.engine, client), strict=True))
        finally:
            await server.drain()


class Shared:
    """An engine that outlives the server around it."""

    def __init__(self, engine: VLLMSteeringModel) -> None:
        self.info, self.is_alive, self.requests_at_once = engine.info, True, 0
        self.has_priority, self.has_structured_outputs = engine.has_priority, engine.has_structured_outputs
        self.start_proof = engine.start_proof
        self.submit, self.tokens_of, self.text_of = engine.submit, engine.tokens_of, engine.text_of

    async def close(self) -> None:
        """It is not this server's to end."""


@contextmanager
def all_backends_on(
    name: str, model_folder: ModelFolder, dtype: str, engine: VLLMSteeringModel | None = None
) -> Iterator[AllBackends]:
    """All backends on a tiny model, or on the bundled one; a running engine of that dtype may be given."""
    folder = ensure_bundled_model() if name == "bundled" else model_folder(name)
    with HFSteeringModel(folder, dtype=getattr(torch, dtype), attn_implementation="eager") as hf:
        if engine is not None:
            yield AllBackends(hf, engine)
        else:
            with VLLMSteeringModel(str(folder), **{**ENGINE_ARGUMENTS, "dtype": dtype}) as own:
                yield AllBackends(hf, own)


def requests_for(all_backends: AllBackends) -> dict[str, GenerateRequest]:
    """What every backend must answer alike, by name."""
    layers, width = all_backends.hf.layer_count, all_backends.hf.hidden_size
    size = 1.0 if layers > 8 else 3.0

    def direction(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=width)

    add, cap, ablate = (
        AddSpec(direction(1) / np.sqrt(width), size),
        ProjectionCapSpec(direction(2), min=-0.1, max=0.3),
        AblationSpec(direction(3), -0.5),
    )
    low, high = 1, layers - 2
    everywhere = CaptureSpec(layers=(0, low, high, layers - 1), site=CaptureSite.BOTH)
    words = all_backends.hf.tokenizer.encode(" sea harbour sunrise sea")

    def chat_of(question: str) -> ChatPrompt:
        return ChatPrompt(messages=[ChatMessage(role="user", content=question)])

    chat = chat_of("Where is the harbour?")
    answer = ChatMessage(role="assistant", content=" It is, ")
    begun = ChatPrompt(messages=[*chat.messages, answer], continue_final_message=True)

    def ask(**fields: object) -> GenerateRequest:
        return GenerateRequest(**{"prompt": TextPrompt(text=TEXT), "sampling": GREEDY, "capture": everywhere, **fields})

    def steered(*operations: object, layer: int = low, **scope: object) -> SteeringSpec:
        return SteeringSpec({layer: LayerSteeringSpec(operations)}, **scope)

    with_arguments = {
        "arguments of the template": ask(prompt=replace(chat, chat_template_kwargs={"enable_thinking": True})),
        "tools": ask(prompt=replace(chat, tools=[TOOL]), steering=steered(add)),
        "fields of messages": ask(
            prompt=ChatPrompt(messages=conversation_from(CALLS)),
            steering=steered(add, positions=["messages[1]", "roles[tool]"]),
        ),
    }
    return {
        "unsteered": ask(),
        "add": ask(steering=steered(add)),
        "cap": ask(steering=steered(cap)),
        "ablate": ask(steering=steered(ablate)),
        "in one order": ask(steering=steered(add, cap, ablate, layer=high)),
        "in another": ask(steering=steered(ablate, cap, add, layer=high)),
        "two layers": ask(steering=SteeringSpec({low: LayerSteeringSpec([add]), high: LayerSteeringSpec([cap])})),
        "the prompt": ask(steering=steered(add, positions="prompt")),
        "the last prompt token": ask(steering=steered(add, positions=-1)),
        "generated tokens": ask(steering=steered(add, positions="generated")),
        "relative": ask(steering=steered(AddSpec(add.vector, 0.5, scaling="relative"))),
        "a limited change": ask(steering=steered(replace(add, max_relative_change=0.1), layer=high)),
        "kept norms": ask(steering=steered(replace(add, keep_norm=True), replace(ablate, keep_norm=True))),
        "positions of operations": ask(
            steering=steered(replace(add, positions=-1), replace(cap, positions="generated"), ablate)
        ),
        "a report": ask(
            steering=SteeringSpec(
                {
                    low: LayerSteeringSpec([add, replace(cap, positions=["generated", 0])]),
                    high: LayerSteeringSpec([cap]),
                },
                positions=["generated", 2],
                report_change=True,
            )
        ),
        "a report about outputs": ask(
            sampling=replace(GREEDY, n=2), steering=replace(steered(add), report_change=True)
        ),
        "a part of the answer": ask(steering=steered(add, positions=["generated[1:3]", -1])),
        "chosen rows": ask(capture=replace(everywhere, positions=[PositionRange(1, 3), -1, "generated"])),
        "a mean": ask(capture=replace(everywhere, pooling="mean"), steering=steered(add)),
        "a mean of chosen rows": ask(capture=replace(everywhere, positions=[1, "generated[1:4]"], pooling="mean")),
        "largest values": ask(capture=replace(everywhere, positions="generated", pooling="max"), steering=steered(cap)),
        "the last row": ask(capture=replace(everywhere, positions="prompt", pooling="last", dtype="float32")),
        "a message": ask(prompt=chat_of("Is it far?"), steering=steered(add, positions="messages[-1]")),
        "no special tokens": ask(
            prompt=chat_of("Is it near?"),
            steering=steered(replace(add, positions="roles[user]"), cap, positions=["prompt", "skip_special_tokens"]),
            capture=replace(everywhere, positions="skip_special_tokens"),
        ),
        "a chat": ask(prompt=chat, steering=steered(add)),
        "a text as it is": ask(prompt=TextPrompt(text=TEXT, add_special_tokens=False)),
        "a chat without a header": ask(prompt=replace(chat, add_generation_prompt=False)),
        "a beginning of the answer": ask(prompt=begun, steering=steered(add, positions=-1)),
        **(with_arguments if "tools" in str(all_backends.hf.tokenizer.chat_template) else {}),
        "a cut text": ask(truncate_prompt_tokens=6, capture=replace(everywhere, positions=[0, -1, "generated"])),
        "cut token ids": ask(prompt=TokenPrompt(token_ids=range(3000, 5000)), truncate_prompt_tokens=9),
        "a text that fits": ask(truncate_prompt_tokens=-1),
        "parts of a content": ask(
            prompt=ChatPrompt(messages=conversation_from([{"role": "user", "content": PARTS}])), steering=steered(cap)
        ),
        "longer pieces": ask(stream_interval=3, steering=steered(add)),
        "one piece": ask(stream_interval=0, steering=steered(add)),
        "one piece, up to a stop string": ask(
            stream_interval=0, sampling=replace(GREEDY, stop=("e",)), steering=steered(add)
        ),
        "a cut chat": ask(prompt=chat, truncate_prompt_tokens=9, steering=steered(add, positions=[2, -1])),
        "n outputs": ask(sampling=replace(GREEDY, n=2), steering=steered(cap)),
        "rows only": ask(sampling=SamplingOptions(max_tokens=0)),
        "rows only, scored": ask(sampling=SamplingOptions(max_tokens=0, prompt_logprobs=2)),
        "rows only, of chosen positions": ask(
            sampling=SamplingOptions(max_tokens=0, n=2, logprobs=2, stop=("a",)),
            steering=steered(add, positions="prompt"),
            capture=replace(everywhere, positions=[0, -1], is_live=True),
        ),
        "one token": ask(sampling=replace(GREEDY, max_tokens=1)),
        "a stop string": ask(sampling=replace(GREEDY, stop=(" the",))),
        "prompt log-probabilities": ask(sampling=replace(GREEDY, prompt_logprobs=3)),
        "allowed tokens": ask(sampling=replace(GREEDY, allowed_token_ids=range(3000, 3020)), steering=steered(add)),
        "bad words": ask(sampling=replace(GREEDY, allowed_token_ids=words, bad_words=("sea", "harbour"))),
        "steered ones": ask(sampling=replace(GREEDY, prompt_logprobs=0, n=2), steering=steered(add, cap, layer=high)),
    }


def texts_for(all_backends: AllBackends) -> dict[str, GenerateRequest]:
    """Prompts that end within a character, and stop strings in the prompt or over several tokens."""
    tokenizer = all_backends.hf.tokenizer
    secret = tuple(tokenizer.encode("My secret prompt words go here and 視𠜎"))
    rest = dict.fromkeys(secret[-1:], 100.0)
    letters = replace(GREEDY, logit_bias=dict.fromkeys(tokenizer.encode("b"), 100.0), repetition_penalty=None)

    def ask(sampling: SamplingOptions, prompt: tuple[int, ...] = secret[:-1]) -> GenerateRequest:
        return GenerateRequest(prompt=TokenPrompt(token_ids=prompt), sampling=sampling)

    return {
        "a split character": ask(GREEDY),
        "two missing tokens": ask(GREEDY, secret[:-2]),
        "a character that is finished": ask(replace(GREEDY, max_tokens=1, logit_bias=rest)),
        "n outputs": ask(replace(GREEDY, n=2, temperature=1.0, seed=1, max_tokens=1, logit_bias=rest)),
        "a stop string of the prompt": ask(replace(GREEDY, stop=("secret", "and 視"))),
        "special tokens": ask(replace(GREEDY, skip_special_tokens=False)),
        "a stop string of three tokens": ask(replace(letters, stop=("bbb",)), secret),
        "with the stop string": ask(replace(letters, stop=("bbb",), include_stop=True), secret),
        "not before the fourth token": ask(replace(letters, stop=("bb", "b"), min_tokens=3), secret),
        "a stop token": ask(replace(letters, stop_token_ids=tokenizer.encode("b"), min_tokens=2), secret),
        "a stop token with its text": ask(
            replace(letters, stop_token_ids=tokenizer.encode("b"), include_stop=True), secret
        ),
    }


async def run(backend: SteeringCalls, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(checked_events(backend, request)), 300)


def same_receipt(mine: Receipt, theirs: Receipt, about: str) -> None:
    """Asserts that two receipts say the same of what was applied."""
    for field in RECEIPT:
        assert getattr(mine, field) == getattr(theirs, field), (about, field)
    assert len(mine.changes) == len(theirs.changes), about
    for change, other in zip(mine.changes, theirs.changes, strict=True):
        assert (change.layer, change.positions, change.capped_positions) == (
            other.layer,
            other.positions,
            other.capped_positions,
        ), about
        assert np.allclose([change.largest, change.mean], [other.largest, other.mean], rtol=CHANGES), about
