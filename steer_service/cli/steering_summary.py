"""What a steering does, in one line: its layers, and the operations of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from steer_service.core.arrays import norm_of
from steer_service.core.specs import AblationSpec, AddScaling, AddSpec, SteeringOp, SteeringSpec

MOST_GROUPS = 6
"""Groups of layers that are described; more are counted."""


@dataclass(frozen=True, slots=True)
class _Described:
    """One operation: what it is, and its numbers by name."""

    kind: str
    numbers: Mapping[str, float]

    @property
    def shape(self) -> tuple[str, ...]:
        """What neighbours have in common that are one group."""
        return self.kind, *self.numbers


Group = list[tuple[int, list[_Described]]]
"""Layers that follow each other and have the same kinds of operations."""


def summary_of(spec: SteeringSpec) -> str:
    """Such as "layers 0-29 (addition, scale x norm 2 to 8.5)".

    The length of a table's vectors may be in the scale or in the vector: an addition has the product, which is the
    length of what it adds, with its sign.
    """
    groups = list(_groups(spec))
    if not groups:
        return "no layer"
    shown = [f"{_layers(group)} ({_operations(group)})" for group in groups[:MOST_GROUPS]]
    left = sum(map(len, groups[MOST_GROUPS:]))
    return ", ".join(shown) + (f" and {left} more" if left else "")


def _groups(spec: SteeringSpec) -> Iterator[Group]:
    group: Group = []
    for layer in sorted(spec.layers):
        operations = [_described(one) for one in spec.layers[layer].operations]
        if not operations:
            continue
        is_next = bool(group) and group[-1][0] + 1 == layer
        if group and not (is_next and [one.shape for one in group[-1][1]] == [one.shape for one in operations]):
            yield group
            group = []
        group.append((layer, operations))
    if group:
        yield group


def _described(operation: SteeringOp) -> _Described:
    match operation:
        case AddSpec(scaling=AddScaling.RELATIVE):
            return _Described("relative addition", {"scale": operation.scale})
        case AddSpec():
            return _Described("addition", {"scale x norm": operation.scale * norm_of(operation.vector)})
        case AblationSpec():
            return _Described("ablation", {"scale": operation.scale})
    bounds = {"min": operation.min, "max": operation.max}
    return _Described("cap", {name: bound for name, bound in bounds.items() if bound is not None})


def _layers(group: Group) -> str:
    first, last = group[0][0], group[-1][0]
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _operations(group: Group) -> str:
    """The operations of each layer of the group, with the range of their numbers."""
    of_place = zip(*(operations for _, operations in group), strict=True)
    return " + ".join(map(_with_ranges, of_place))


def _with_ranges(same: tuple[_Described, ...]) -> str:
    texts = [same[0].kind]
    for name in same[0].numbers:
        least, most = (f"{bound(one.numbers[name] for one in same):.4g}" for bound in (min, max))
        texts.append(f"{name} {least}" if least == most else f"{name} {least} to {most}")
    return ", ".join(texts)
