"""What the ranks of one engine find out together, so that all of them refuse a model or none does.

Relies on (vLLM 0.24 to 0.33): `get_tp_group`, `get_pp_group`, whose groups have a `cpu_group` and a `world_size`.
tests/engine/test_seams.py notices a change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group, get_tp_group


def agreed_finding(finding: str, streams: Sequence[tuple[str, str]]) -> str:
    """The finding of the first rank that has one, on all ranks; "" if none has.

    `streams`: (name, hash) of each residual stream of this rank; those of all tensor-parallel ranks must be equal. All
    ranks must call this equally often, whatever they found: each call waits for the others.
    """
    answers = _gathered(get_tp_group(), (finding, tuple(streams)))
    found = next((text for text, _ in answers if text), "") or _difference([streams for _, streams in answers])
    return next((text for text in _gathered(get_pp_group(), found) if text), "")


def _gathered(group: Any, mine: Any) -> list[Any]:
    """What each rank of the group has, in the order of ranks."""
    if group.world_size == 1:
        return [mine]
    answers: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(answers, mine, group=group.cpu_group)
    return answers


def _difference(streams_R: Sequence[Sequence[tuple[str, str]]]) -> str:
    """The first stream that is not the same on all ranks, in words; "" if there is none."""
    for rank, streams in enumerate(streams_R[1:], start=1):
        for (name, first), (_, other) in zip(streams_R[0], streams, strict=True):
            if first != other:
                return (
                    f"{name} is not the same on the tensor-parallel ranks 0 and {rank}, bit for bit: what one of them "
                    "steers and captures is not what the others have. Try --disable-custom-all-reduce, which adds the "
                    "ranks' parts up in another way"
                )
    return ""
