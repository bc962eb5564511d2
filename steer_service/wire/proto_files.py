"""Where the contract's `.proto` files are, for code generators of any language."""

from pathlib import Path


def proto_folder() -> Path:
    """Returns the folder to give to `protoc -I`; the files in it are `steer/v1/*.proto`.

    In a wheel it is a folder of the package, in a checkout a link to `proto/` at the top.
    """
    return Path(__file__).parents[1] / "proto"
