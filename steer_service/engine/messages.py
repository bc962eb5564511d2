"""What the API server process and the workers send each other, as plain data."""

import json
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from typing import Any

from steer_service.core.capture import CaptureSite
from steer_service.core.span_table import ScopeTable, SpanTable
from steer_service.core.start_proof import StartProof
from steer_service.engine.config import EXTRA_ARGS_KEY
from steer_service.engine.region import Region, region_name
from steer_service.engine.slots import ProgramLease
from steer_service.ops.plan import NO_SLOT
from steer_service.runtime.prepare import PreparedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRequest:
    """What the workers do for one output; travels in `SamplingParams.extra_args` of its vLLM request."""

    output: str
    """Name of the output, `<request id>/<output index>`. vLLM's own id is different."""
    slot: int
    """Slot of its program in the bank, or NO_SLOT."""
    digest: str
    """Digest of that program; "" without one."""
    steered: SpanTable
    """Steered positions."""
    segment: str
    """Name of its region's segment."""
    offset: int
    """Offset of its region in the segment, in bytes."""
    stages: int
    """See RegionLayout."""
    rows: int
    """See RegionLayout."""
    sites: tuple[CaptureSite, ...]
    """See RegionLayout."""
    layers: tuple[int, ...]
    """See RegionLayout."""
    captured: SpanTable
    """See RegionLayout."""
    dtype: str
    """See RegionLayout."""
    reusable_rows: int
    """Largest number of rows from the prefix cache: the rows before the first captured one."""
    scopes: ScopeTable | None = None
    """Positions of each scope of the program. Default: it has one, `steered`."""
    reported: tuple[int, ...] = ()
    """See RegionLayout."""

    @property
    def region(self) -> str:
        """Name of its region, see `region.region_name`."""
        return region_name(self.segment, self.offset)

    def to_extra_args(self) -> dict[str, Any]:
        """The form in which vLLM carries it to the scheduler and the workers; tables are bytes."""
        request: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in ("steered", "captured", "scopes"):
            request[name] = request[name].to_bytes() if request[name] is not None else None
        return {EXTRA_ARGS_KEY: {**request, "sites": [site.value for site in self.sites]}}

    @classmethod
    def from_extra_args(cls, extra_args: dict[str, Any] | None) -> "WorkerRequest | None":
        """The request that `to_extra_args` wrote, or None for a request that is neither steered nor captured."""
        request = (extra_args or {}).get(EXTRA_ARGS_KEY)
        if request is None:
            return None
        spans = {name: SpanTable.from_bytes(request[name]) for name in ("steered", "captured")}
        scopes = ScopeTable.from_bytes(request["scopes"]) if request["scopes"] is not None else None
        sites = tuple(CaptureSite(site) for site in request["sites"])
        layers = {name: tuple(request[name]) for name in ("layers", "reported")}
        return cls(**{**request, **spans, **layers, "scopes": scopes, "sites": sites})


def worker_request(prepared: PreparedRequest, output: str, region: Region, lease: ProgramLease | None) -> WorkerRequest:
    """What the workers do for one output of a request."""
    layout = region.layout
    return WorkerRequest(
        output=output,
        slot=lease.slot if lease is not None else NO_SLOT,
        digest=lease.digest if lease is not None else "",
        steered=prepared.rows.steered_table,
        scopes=prepared.rows.scope_table,
        segment=region.name,
        offset=region.offset,
        stages=layout.stages,
        rows=layout.rows,
        sites=layout.sites,
        layers=layout.layers,
        captured=layout.captured,
        dtype=layout.dtype,
        reusable_rows=prepared.rows.reusable,
        reported=layout.reported,
    )


def reusable_rows(extra_args: dict[str, Any] | None) -> int | None:
    """`WorkerRequest.reusable_rows`, without parsing the rest; None if there is no WorkerRequest.

    The scheduler reads it at each step in which a request waits.
    """
    request = (extra_args or {}).get(EXTRA_ARGS_KEY)
    return None if request is None else int(request["reusable_rows"])


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What one worker found when it loaded the model. The API server process checks it."""

    layers: tuple[int, ...] = ()
    """Layers with a hook on this rank."""
    hidden_size: int = 0
    """Hidden size of the residual stream."""
    dtype: str = ""
    """Dtype of the residual stream."""
    sees_memory: bool = True
    """False if the worker cannot open the API server process's shared memory, see remote_workers.py."""
    refusal: str = ""
    """Why the worker cannot steer this model; "" if it can."""
    refusal_reason: str = ""
    """`SteerError.reason` of the refusal."""
    proof: StartProof | None = None
    """What this worker has proven; None if it refuses."""
    lags: bool = False
    """True on an earlier pipeline stage that may still complete a step when the last stage's token is visible."""

    @property
    def fingerprint(self) -> int:
        """A number from 1 to 2**64 - 1 that is the same for equal reports, whatever the proof took and found."""
        same = replace(self, proof=None)
        return int.from_bytes(sha256(json.dumps(same.to_rpc()).encode()).digest()[:8], "big") or 1

    def to_rpc(self) -> dict[str, Any]:
        """The form in which `collective_rpc` returns it."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_rpc(cls, report: dict[str, Any]) -> "WorkerReport":
        """The report that `to_rpc` wrote."""
        proof = report["proof"]
        if proof is not None:
            proof = StartProof(**{**proof, "step_classes": tuple(proof["step_classes"])})
        return cls(**{**report, "layers": tuple(report["layers"]), "proof": proof})
