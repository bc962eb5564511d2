"""Asks a server what it says about itself."""

import grpc

from steer_client.channel import ClientConfig, _blocking_channel, call_metadata, error_from_call
from steer_service.core.server_facts import ServerFacts
from steer_service.wire.info import server_facts_from_proto
from steer_service.wire.info_pb2 import GetServerInfoRequest
from steer_service.wire.info_pb2_grpc import InfoServiceStub


def fetch_server_facts(config: ClientConfig) -> ServerFacts:
    """Gets the facts, blocking, over a channel of its own; raises a SteerError. A server that loads answers too."""
    with _blocking_channel(config) as channel:
        try:
            response = InfoServiceStub(channel).GetServerInfo(  # type: ignore[no-untyped-call]
                GetServerInfoRequest(), timeout=config.unary_timeout_s, metadata=call_metadata(config)
            )
        except grpc.RpcError as error:
            raise error_from_call(error, config.address) from error
    return server_facts_from_proto(response)
