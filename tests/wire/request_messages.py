"""Messages of a request with one steered layer or one captured layer."""

from steer_service.wire import capture_pb2, generation_pb2, steering_pb2
from steer_service.wire.tensor_pb2 import DTYPE_F32, Tensor

UNSET = steering_pb2.SteeringOperation()


def add(vector: steering_pb2.Vector) -> steering_pb2.SteeringOperation:
    return steering_pb2.SteeringOperation(add=steering_pb2.AddSpec(vector=vector))


def inline(data: bytes = b"\0\0\x80\x3f" * 4, shape=(4,), dtype=DTYPE_F32) -> steering_pb2.Vector:
    return steering_pb2.Vector(inline=Tensor(dtype=dtype, shape=shape, data=data))


def steered(*operations: steering_pb2.SteeringOperation, layer: int | None = 5) -> generation_pb2.GenerateRequest:
    entry = steering_pb2.LayerSteeringSpec(layer=layer, operations=operations)
    return generation_pb2.GenerateRequest(text="hi", steering=steering_pb2.SteeringSpec(layers=[entry]))


def captured(**fields) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(text="hi", capture=capture_pb2.CaptureSpec(layers=[0], **fields))
