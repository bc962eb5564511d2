"""ModelInfo as a message, and the contract's files as stubs."""

from hypothesis import given

from steer_service.wire import capture_pb2, generation_pb2, info_pb2, steering_pb2, tokenizer_pb2
from steer_service.wire.info import model_info_from_proto, model_info_to_proto
from tests.wire import strategies


@given(strategies.model_infos)
def test_the_facts_come_back_equal(info):
    message = info_pb2.ModelInfo.FromString(model_info_to_proto(info).SerializeToString())
    assert model_info_from_proto(message) == info


def test_every_service_of_the_contract_is_there():
    files = (generation_pb2, steering_pb2, capture_pb2, tokenizer_pb2, info_pb2)
    names = {name for file in files for name in file.DESCRIPTOR.services_by_name}
    assert names == {"GenerationService", "VectorService", "CaptureService", "TokenizerService", "InfoService"}
