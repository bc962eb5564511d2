"""Every proto file says which package its code has in each language; a client then needs no mapping of its own."""

import importlib
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileOptions

PROTOS = sorted((Path(__file__).parents[2] / "proto" / "steer" / "v1").glob("*.proto"))

OPTIONS = {
    "csharp_namespace": "Steer.V1",
    "go_package": "steerllm/steer/v1;steerv1",  # no domain: the files are one package and never import each other
    "java_multiple_files": True,
    "java_package": "com.steer.v1",
    "objc_class_prefix": "SXX",
    "php_namespace": "Steer\\V1",
    "ruby_package": "Steer::V1",
}
"""The names that buf's managed mode gives to the package steer.v1. They are part of the contract."""


def test_there_are_proto_files() -> None:
    assert PROTOS


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.name)
def test_a_proto_file_has_the_options_of_every_language(proto: Path) -> None:
    module = importlib.import_module(f"steer_service.wire.{proto.stem}_pb2")
    options: FileOptions = module.DESCRIPTOR.GetOptions()

    assert {field.name: value for field, value in options.ListFields()} == OPTIONS
