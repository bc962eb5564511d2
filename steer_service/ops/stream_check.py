"""What a kernel, which uses raw addresses, counts on in the tensors of a layer."""

import torch

from steer_service.core.errors import EngineFailed


def check_stream(
    tensor_TD: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], rows_needed: int, hidden_size: int
) -> None:
    """Raises EngineFailed for a tensor that a kernel, which uses raw addresses, would misread."""
    if (
        tensor_TD.dtype != dtype
        or tensor_TD.shape != shape
        or shape[0] < rows_needed
        or shape[1] != hidden_size
        or not tensor_TD.is_contiguous()
    ):
        raise EngineFailed(
            f"a layer returned {tensor_TD.dtype} of {list(tensor_TD.shape)}, expected {dtype} of at least "
            f"[{rows_needed}, {hidden_size}], contiguous",
            reason="WRONG_STREAM",
        )
