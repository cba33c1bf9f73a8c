"""Compare exported files in fresh processes: one for those that need no PyTorch, which it does not import."""

import json
import subprocess
import sys
from pathlib import Path

from distlenet.export.exported_network import OUTPUTS
from distlenet.export.measured import FileResult
from distlenet.export.reference import Reference
from distlenet.export.trained_source import TrainedSource
from distlenet.utils.errors import UserError
from distlenet.utils.process import exit_with_parent

TORCH_FREE = ".onnx"


def compare_in_fresh_processes(
    work: Path, source: TrainedSource, reference: Reference, networks: dict[str, list[Path]]
) -> dict[str, FileResult]:
    """Return the result of each network, given by its files. Raise UserError if one cannot be loaded and run."""
    results: dict[str, FileResult] = {}
    for torch_free in (True, False):
        chosen = {name: files for name, files in networks.items() if name.endswith(TORCH_FREE) == torch_free}
        group = {name: [str(file) for file in files] for name, files in chosen.items()}
        if not group:
            continue
        job = {
            "parts": reference.parts,
            "singles": reference.singles,
            "inputs": list(reference.example),
            "outputs": list(OUTPUTS),
            "tolerances": reference.tolerances,
            "networks": group,
            "network": {
                "path": str(source.file),
                "overrides": list(source.overrides),
                "files": list(source.files),
            },
        }
        (work / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "distlenet.export.parity", str(work)]
        ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=exit_with_parent)
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1][:500]
            raise UserError(f"export: {', '.join(group)}: cannot be loaded and run: {reason}; nothing is written")
        results |= {name: FileResult(**each) for name, each in json.loads((work / "results.json").read_text()).items()}
    return results
