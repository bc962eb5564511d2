"""TokenizerService: shows prompts as the model gets them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from steer_service.server.aborted_calls import errors_as_status
from steer_service.server.admission import Admission
from steer_service.server.call_end import CallEnd
from steer_service.server.callers import caller_of
from steer_service.server.fair_queue import Load
from steer_service.server.request_body import RequestBody
from steer_service.wire import tokenizer_pb2
from steer_service.wire.message_scan import model_limits
from steer_service.wire.tokenizer_pb2_grpc import TokenizerServiceServicer
from steer_service.wire.tokens import (
    detokenize_from_proto,
    render_from_proto,
    rendered_to_proto,
    tokenize_from_proto,
    tokenized_to_proto,
)

M = TypeVar("M", bound=Message)


class TokenizerServicer(TokenizerServiceServicer):
    """Serves the tokenizer of the backend of `admission`. Calls wait for their turn, fairly between clients."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def Tokenize(self, body: RequestBody, context: grpc.aio.ServicerContext) -> tokenizer_pb2.TokenizeResponse:
        """Returns the tokens of a text."""
        async with errors_as_status(context), self._turn(body, context, tokenizer_pb2.TokenizeRequest) as message:
            tokens = await self._admission.open_backend.tokens_of(tokenize_from_proto(message))
            return await asyncio.to_thread(tokenized_to_proto, tokens)  # of 100,000 tokens it takes 0.2 s

    async def Detokenize(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.DetokenizeResponse:
        """Returns the text of tokens."""
        async with errors_as_status(context), self._turn(body, context, tokenizer_pb2.DetokenizeRequest) as message:
            text = await self._admission.open_backend.text_of(detokenize_from_proto(message))
            return tokenizer_pb2.DetokenizeResponse(text=text)

    async def Render(self, body: RequestBody, context: grpc.aio.ServicerContext) -> tokenizer_pb2.RenderResponse:
        """Returns a prompt as the model gets it."""
        async with errors_as_status(context), self._turn(body, context, tokenizer_pb2.RenderRequest) as message:
            tokens = await self._admission.open_backend.tokens_of(render_from_proto(message))
            return await asyncio.to_thread(rendered_to_proto, tokens)

    @asynccontextmanager
    async def _turn(self, body: RequestBody, context: grpc.aio.ServicerContext, kind: type[M]) -> AsyncIterator[M]:
        """The message, once the call has its turn; raises the SteerError of a refusal.

        The bytes are scanned before they wait, and parsed after it.
        """
        caller, end = caller_of(context), CallEnd(context)
        self._admission.check_reading_room(caller)
        body.scan(kind, model_limits(self._admission.backend.info))
        async with self._admission.reading(caller, Load(bytes=len(body)), end):
            yield body.parse(kind)
