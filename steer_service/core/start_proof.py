"""What an engine has proven about itself before it serves."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StartProof:
    """Steering and capture were right on the device and in the loaded model, in each way in which steps are run."""

    device: str
    """Name of the device."""
    seconds: float
    """Time that the proof took."""
    kernel_rows: int
    """Rows that the kernel steered and that were compared with float64."""
    kernel_error: float
    """The largest error of these rows in units of the tolerance of docs/numerics.md; at most 1."""
    step_classes: tuple[str, ...]
    """The ways in which steps are run, in each of which the model was proven, such as "full graph of 8 rows"."""
    is_exact: bool
    """True if rows without steering were compared bit by bit with and without steered neighbours.

    False if the model itself does not compute equal rows to equal bits; they were compared within a tolerance.
    """

    staging_bytes: int = 0
    """Memory of each device in which captured rows wait for their copy to the host; 0 where the device is the host."""
    pinned_bytes: int = 0
    """Pinned memory of the host of each worker, to which they are copied."""

    @classmethod
    def of_all(cls, proofs: Sequence["StartProof"]) -> "StartProof | None":
        """The proof of an engine whose workers, at the same time, proved these; None if there is none."""
        if not proofs:
            return None
        return cls(
            device=proofs[0].device,
            seconds=max(proof.seconds for proof in proofs),
            kernel_rows=sum(proof.kernel_rows for proof in proofs),
            kernel_error=max(proof.kernel_error for proof in proofs),
            step_classes=tuple(dict.fromkeys(name for proof in proofs for name in proof.step_classes)),
            is_exact=all(proof.is_exact for proof in proofs),
            staging_bytes=max(proof.staging_bytes for proof in proofs),
            pinned_bytes=max(proof.pinned_bytes for proof in proofs),
        )

    def __str__(self) -> str:
        neighbours = "bit by bit" if self.is_exact else "within a tolerance, as this model's rows depend on each other"
        return (
            f"steering and capture are proven on {self.device} in {self.seconds:.1f} s: the kernel on "
            f"{self.kernel_rows} rows (largest error {self.kernel_error:.2f} of the tolerance); the model "
            f"{', '.join(self.step_classes)}; neighbours {neighbours}{self._memory()}"
        )

    def _memory(self) -> str:
        if not self.staging_bytes:
            return ""
        return f"; {self.staging_bytes >> 20} MiB of the device and {self.pinned_bytes >> 20} MiB pinned for captures"
