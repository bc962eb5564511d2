"""Recorded steps: what a schedule asked for, what the V1 runner's batch said, and what the model was fed."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of an engine, with short names for its requests."""

    scheduled: dict[str, int]
    """SchedulerOutput.num_scheduled_tokens."""
    new: list[str]
    """Requests scheduled for the first time."""
    resumed: list[str]
    """Requests that start again after preemption."""
    preempted: list[str]
    """Requests preempted by this schedule."""
    finished: list[str]
    """Requests that finished since the last step."""
    drafts: dict[str, int]
    """Draft tokens among the scheduled tokens of each request that has any."""
    req_ids: list[str]
    """The V1 batch's order."""
    num_scheduled_tokens: list[int]
    """The V1 runner's row counts, in batch order."""
    num_computed_tokens_cpu: list[int]
    """The V1 batch's positions, in batch request and beyond it."""
    fed: list[tuple[str, int, int]]
    """Whose tokens the model was fed, row after row: (request, rows, first position)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The steps of one scenario."""

    vllm: str
    runner: str
    steps: list[Step]

    def to_json(self) -> str:
        """One step a line, so that a new recording shows what changed."""
        steps = ",\n".join(json.dumps(dataclasses.asdict(step)) for step in self.steps)
        return f'{{"vllm": "{self.vllm}", "runner": "{self.runner}", "steps": [\n{steps}\n]}}\n'

    @classmethod
    def load(cls, name: str) -> "Recording":
        values = json.loads((FOLDER / f"{name}.json").read_text())
        steps = [Step(**{**step, "fed": [tuple(part) for part in step["fed"]]}) for step in values.pop("steps")]
        return cls(steps=steps, **values)


def recordings() -> list[str]:
    """Names of the committed recordings."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))
