"""The client that a call comes from, as named by its metadata; the server's only rule for client ids."""

import grpc

from steer_service.core.errors import InvalidRequest

CLIENT_ID = "steer-client-id"
"""Metadata key of the client id: a secret that the client chooses and sends with every call."""

MAX_LENGTH = 128
"""Characters of a client id at most. The Python client also restricts which characters it has."""


def client_id_of(context: grpc.aio.ServicerContext) -> str:
    """The client that captures and vectors of this call belong to, never ""; calls without an id share one client.

    Raises InvalidRequest (OUT_OF_RANGE) for an id that is too long.
    """
    named = next((value for key, value in context.invocation_metadata() or () if key == CLIENT_ID), "")
    text = named if isinstance(named, str) else named.hex()
    if len(text) > MAX_LENGTH:
        raise InvalidRequest(
            f"it has {len(text)} characters, at most {MAX_LENGTH}", reason="OUT_OF_RANGE", field=CLIENT_ID
        )
    return f"client {text}"
