"""What a job needs, looked at before it starts: of each rank alone, between nodes, and of all together."""

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was looked at, how it is, and where it is bad the mend."""

    name: str
    status: Literal["ok", "note", "FAIL"]  # a note is worth knowing, and stops no job
    found: str
    mend: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return all of it in plain values."""
        return asdict(self)
