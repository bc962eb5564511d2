"""Which client a call comes from, by its own account."""

import grpc

from steer_service.core.errors import InvalidRequest

CLIENT_ID = "steer-client-id"
"""Metadata in which a client says a secret of its own choice, the same in every call."""

MAX_LENGTH = 128


def client_id_of(context: grpc.aio.ServicerContext) -> str:
    """The client to whom captures of this call belong, never ""; clients that say nothing are one client.

    Raises InvalidRequest for a name that is too long.
    """
    named = next((value for key, value in context.invocation_metadata() or () if key == CLIENT_ID), "")
    text = named if isinstance(named, str) else named.hex()
    if len(text) > MAX_LENGTH:
        raise InvalidRequest(
            f"it has {len(text)} characters, at most {MAX_LENGTH}", reason="OUT_OF_RANGE", field=CLIENT_ID
        )
    return f"client {text}"
