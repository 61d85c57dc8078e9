"""What it changed to hold weights in another format than their file's codes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Requantised:
    """source, held_as: formats, of the file and in memory. error: root mean square of what weights changed by, over
    that of the weights. worst, worst_error: the tensors with the largest. weights: how many were compared."""

    source: str
    held_as: str
    error: float
    worst: str
    worst_error: float
    weights: int

    def line(self) -> str:
        """One line for people."""
        return (
            f"weights of the file ({self.source}) are held as {self.held_as}: they change by {self.error:.2%} (root "
            f"mean square of {self.weights / 1e6:.1f} million compared), most in {self.worst}: {self.worst_error:.2%}"
        )
