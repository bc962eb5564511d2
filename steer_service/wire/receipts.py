"""Receipts of what was really applied to an output <-> messages."""

from dataclasses import asdict

from steer_service.core.events import Receipt
from steer_service.core.layer_change import LayerChange
from steer_service.wire import generation_pb2


def receipt_to_proto(receipt: Receipt) -> generation_pb2.Receipt:
    """`receipt` as a message."""
    return generation_pb2.Receipt(
        steering_digest=bytes.fromhex(receipt.steering_digest),
        steered_layers=receipt.steered_layers,
        rows_steered=receipt.rows_steered,
        captured_layers=receipt.captured_layers,
        rows_captured=receipt.rows_captured,
        rows_from_prefix_cache=receipt.rows_from_prefix_cache,
        rows_total=receipt.rows_total,
        bytes_reserved=receipt.bytes_reserved,
        bytes_captured=receipt.bytes_captured,
        changes=[generation_pb2.LayerChange(**asdict(change)) for change in receipt.changes],
    )


def receipt_from_proto(message: generation_pb2.Receipt) -> Receipt:
    """The receipt in a message."""
    return Receipt(
        steering_digest=message.steering_digest.hex(),
        steered_layers=tuple(message.steered_layers),
        rows_steered=message.rows_steered,
        captured_layers=tuple(message.captured_layers),
        rows_captured=message.rows_captured,
        rows_from_prefix_cache=message.rows_from_prefix_cache,
        rows_total=message.rows_total,
        bytes_reserved=message.bytes_reserved,
        bytes_captured=message.bytes_captured,
        changes=tuple(map(_change_from_proto, message.changes)),
    )


def _change_from_proto(message: generation_pb2.LayerChange) -> LayerChange:
    return LayerChange(
        layer=message.layer,
        positions=message.positions,
        largest=message.largest,
        mean=message.mean,
        capped_positions=message.capped_positions,
    )
