"""GenerationService: requests come in, events go out."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import grpc

from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.errors import EngineFailed
from steer_service.server.admission import Admission, Ticket
from steer_service.server.status import translated
from steer_service.wire import generation_pb2
from steer_service.wire.events import EventWriter
from steer_service.wire.generation_pb2_grpc import GenerationServiceServicer
from steer_service.wire.request import request_from_proto


class GenerationServicer(GenerationServiceServicer):
    """Serves Generate and Cancel around whatever backend `admission` has."""

    def __init__(self, admission: Admission, on_engine_death: Callable[[], None]) -> None:
        self._admission = admission
        self._on_engine_death = on_engine_death

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[generation_pb2.GenerateResponse, None]:
        """Streams the events of one request; closing the stream aborts it."""
        # An async generator: gRPC ends it in either of two ways, CancelledError while it awaits the engine and
        # GeneratorExit while it waits for a slow reader. Both pass, and release everything on their way.
        async with translated(context):
            backend = self._admission.backend  # a server that is not ready says so before it reads the request
            with self._admission.admit(request_from_proto(request)) as ticket:
                writer = _writer_for(ticket, backend.info)
                ticket.events = backend.submit(ticket.request)
                async with aclosing(ticket):
                    try:
                        async for event in ticket.events:
                            for response in writer.responses(event):
                                ticket.is_sending = True
                                yield response
                                ticket.is_sending = False
                                ticket.check_running()
                    except EngineFailed as error:
                        if error.reason == "ENGINE_DIED":
                            self._on_engine_death()
                        raise

    async def Cancel(
        self, request: generation_pb2.CancelRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.CancelResponse:
        """Stops the request whose token is given, if it is running."""
        return generation_pb2.CancelResponse(cancelled=self._admission.cancel(request.cancel_token))


def _writer_for(ticket: Ticket, info: ModelInfo) -> EventWriter:
    capture = ticket.request.capture
    if capture is None:
        return EventWriter(cancel_token=ticket.cancel_token)
    itemsize = dtype_from_name(capture.dtype or info.dtype).itemsize
    return EventWriter(
        capture.max_chunk_bytes,
        cancel_token=ticket.cancel_token,
        capture_row_bytes=len(capture.layers) * len(capture.site.parts) * info.hidden_size * itemsize,
        capture_positions=capture.positions,
    )
