"""What the contract says about its methods."""

import pytest
from google.protobuf.descriptor_pb2 import MethodOptions

from steer_service.wire import capture_pb2, generation_pb2, info_pb2, steering_pb2, tokenizer_pb2

READS = {"GetServerInfo", "GetModel", "GetVector", "ListVectors", "FetchCapture", "Tokenize", "Detokenize", "Render"}
"""Methods that change nothing and may be repeated."""

METHODS = {
    method.name: method
    for file in (capture_pb2, generation_pb2, info_pb2, steering_pb2, tokenizer_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_reads_and_only_reads_are_marked_as_free_of_side_effects(name: str) -> None:
    level = METHODS[name].GetOptions().idempotency_level
    assert (level == MethodOptions.NO_SIDE_EFFECTS) is (name in READS)
