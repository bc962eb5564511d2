"""The ways in which vLLM runs a step: as one graph, as graphs between the attention, or without graphs.

vLLM chooses the class of a step by its rows, and by whether all of its requests decode. The self-test makes dummy runs
of every class and looks at what was chosen. A step that captures more than graphs have room for runs without them.

Relies on (vLLM 0.24 to 0.33): in the V1 runner, `_determine_batch_execution_and_padding`, whose result begins with the
mode and the batch's descriptor and which takes `force_eager`, and `cudagraph_dispatcher.cudagraph_keys`; in the V2
runner, `cudagraph_manager` with `dispatch(requests, rows, rows of each request, ...)`, which finds no graph unless
`_graphs_captured`, and `_capture_descs`. Where ranks of data parallelism agree on a class, one without graphs wins.
tests/engine/test_seams.py and tests/engine/test_recorded_graphs.py notice a change.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from steer_service.engine.worker.batch_rows import is_v2
from steer_service.engine.worker.replaced_method import replaced

UNGRAPHED = "NONE"
"""vLLM's name of the mode without graphs."""

FULL = "FULL"
"""vLLM's name of the mode in which one graph has the whole forward pass."""

DESCRIPTIONS = {UNGRAPHED: "without graphs", FULL: "full graph", "PIECEWISE": "piecewise graphs"}


@dataclass(frozen=True, slots=True)
class DispatchClass:
    """How vLLM ran a step."""

    mode: str
    """vLLM's name of the mode: FULL, PIECEWISE or NONE."""
    rows: int
    """Rows that the model ran, with padding."""

    def __str__(self) -> str:
        return f"{DESCRIPTIONS.get(self.mode, self.mode)} of {self.rows} rows"


@dataclass(frozen=True, slots=True)
class DummyShape:
    """What decides the class of a dummy run."""

    rows: int
    """Its rows, without padding."""
    is_decode: bool = False
    """Each row is a request of its own that decodes; else vLLM may not use the graphs of decoding."""
    adapters: int = 0
    """Active LoRA adapters, which have graphs of their own."""
    without_graphs: bool = False
    """Its class is UNGRAPHED, as that of a step which captures more than graphs have room for."""


def graph_sizes(runner: Any) -> dict[tuple[str, int], list[int]]:
    """The rows of all graphs that vLLM has recorded, ascending, for each mode and number of LoRA adapters."""
    sizes: dict[tuple[str, int], set[int]] = {}
    if is_v2(runner):
        manager = runner.cudagraph_manager
        is_recorded = manager is not None and getattr(manager, "_graphs_captured", True)
        descriptors = manager._capture_descs if is_recorded else {}
        most = max((one.num_active_loras for ones in descriptors.values() for one in ones), default=0)
        for mode, ones in descriptors.items():  # a dummy run has as many adapters as there may be
            sizes[mode.name, 0] = {one.num_tokens for one in ones if one.num_active_loras == most}
    else:
        dispatcher = getattr(runner, "cudagraph_dispatcher", None)
        for mode, ones in (dispatcher.cudagraph_keys if dispatcher is not None else {}).items():
            for one in ones:
                sizes.setdefault((mode.name, getattr(one, "num_active_loras", 0)), set()).add(one.num_tokens)
    return {key: sorted(found) for key, found in sizes.items() if found}


def shapes_to_prove(runner: Any, rows: int) -> list[DummyShape]:
    """Shapes of dummy runs that reach every class; the first has about `rows` rows and no graph, if that can be had.

    Of each mode, the smallest, a middle and the largest graph: the middle one padded, if one row less does not have a
    graph of its own.
    """
    sizes = graph_sizes(runner)
    largest = max((size for found in sizes.values() for size in found), default=0)
    few = min(rows, runner.max_num_tokens)
    beyond = [rows for rows in (largest + 1, *_compiled_sizes(runner)) if largest < rows <= runner.max_num_tokens]
    shapes = [DummyShape(rows) for rows in beyond] or [DummyShape(few, without_graphs=largest > 0)]
    shapes += [DummyShape(few), DummyShape(1)]
    for (mode, adapters), found in sizes.items():
        middle = found[len(found) // 2]
        chosen = [found[0], middle, found[-1]] if adapters == 0 else [middle]
        for size in chosen:
            is_padded = size == middle and size > 1 and size - 1 not in found
            count = size - 1 if is_padded else size
            is_decode = mode == FULL and count <= runner.scheduler_config.max_num_seqs
            if count <= runner.max_num_tokens:
                shapes.append(DummyShape(count, is_decode, adapters))
    return list(dict.fromkeys(shapes))


def _compiled_sizes(runner: Any) -> list[int]:
    """The first number of rows of each range that vLLM compiles on its own."""
    compilation = runner.vllm_config.compilation_config
    ranges = compilation.get_compile_ranges() if getattr(compilation, "compile_ranges_endpoints", None) else []
    return [found.start for found in ranges]


def modes_to_observe(runner: Any) -> set[str]:
    """The modes in which steps may run, of which at least one dummy run must have been of each."""
    return {mode for mode, adapters in graph_sizes(runner) if adapters == 0}


def first_rows(runner: Any, shape: DummyShape) -> list[int]:
    """Rows that begin a request of a dummy run, which later rows of the request may depend on."""
    requests = min(shape.rows, runner.scheduler_config.max_num_seqs)
    each, more = divmod(shape.rows, requests)
    # `more` requests are longer by a row, or the last one is longer by all of them: vLLM's versions differ.
    return [number * each for number in range(min(requests, requests - more + 1))]


def avoid_graphs(runner: Any, is_needed: Callable[[], bool]) -> None:
    """Makes steps run without graphs where `is_needed`, which is called when vLLM chooses; once they are recorded."""
    for owner, name, method in _avoiding(runner, is_needed):
        setattr(owner, name, method)  # on the instance, as in watch_rows


def _avoiding(runner: Any, is_needed: Callable[[], bool]) -> list[tuple[Any, str, Callable[..., Any]]]:
    """The method to replace: its owner, its name, and what replaces it; none if there are no graphs."""
    if is_v2(runner):
        manager = runner.cudagraph_manager
        return [] if manager is None else [(manager, "dispatch", _avoiding_of_v2(manager, is_needed))]
    determine = runner._determine_batch_execution_and_padding

    def determined(*args: Any, **kwargs: Any) -> Any:
        if is_needed():
            kwargs["force_eager"] = True
        return determine(*args, **kwargs)

    return [(runner, "_determine_batch_execution_and_padding", determined)]


def _avoiding_of_v2(manager: Any, is_needed: Callable[[], bool]) -> Callable[..., Any]:
    dispatch = manager.dispatch

    def dispatched(*args: Any, **kwargs: Any) -> Any:
        has_graphs = manager._graphs_captured
        manager._graphs_captured = has_graphs and not is_needed()
        try:
            return dispatch(*args, **kwargs)
        finally:
            manager._graphs_captured = has_graphs

    return dispatched


@contextmanager
def watched_dispatch(runner: Any, shape: DummyShape) -> Iterator[list[DispatchClass]]:
    """Within the block, the classes of the dummy runs, in order; makes them of this shape as far as vLLM does not."""
    with ExitStack() as stack:
        if shape.without_graphs:
            for owner, name, method in _avoiding(runner, lambda: True):
                stack.enter_context(replaced(owner, name, method))
        yield stack.enter_context(_watched(runner, shape))


@contextmanager
def _watched(runner: Any, shape: DummyShape) -> Iterator[list[DispatchClass]]:
    seen: list[DispatchClass] = []
    if not is_v2(runner):
        determine = getattr(runner, "_determine_batch_execution_and_padding", None)
        if determine is None:
            yield seen
            return

        def determined(*args: Any, **kwargs: Any) -> Any:
            result = determine(*args, **kwargs)
            seen.append(DispatchClass(result[0].name, result[1].num_tokens))
            return result

        with replaced(runner, "_determine_batch_execution_and_padding", determined):
            yield seen
        return
    manager = runner.cudagraph_manager
    dispatch = manager.dispatch

    def dispatched(requests: int, rows: int, rows_of_each: int | None, *args: Any, **kwargs: Any) -> Any:
        if not shape.is_decode:  # requests of one row each would always be taken for decoding
            rows_of_each = None
            if "max_query_len" in kwargs:
                kwargs["max_query_len"] = None
        result = dispatch(requests, rows, rows_of_each, *args, **kwargs)
        seen.append(DispatchClass(result.cg_mode.name, result.num_tokens))
        return result

    with replaced(manager, "dispatch", dispatched):
        yield seen
