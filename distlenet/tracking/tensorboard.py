"""TensorBoard's event files, rewritten from ``metrics.jsonl`` at each start of a run."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from distlenet.tracking.base import NETWORK_GRAPH_FILE, NETWORK_INPUTS_FILE, Record
from distlenet.tracking.graph_def import encode_graph


class TensorBoard:
    """Write a run to ``RUN/tensorboard``.

    Each number of each record is a scalar over optimizer steps, the settings that change the result are
    hyperparameters, and the confusion matrix and the most confident mistakes are images, if matplotlib is installed.
    The graph of the network and its inputs are files there, which the training has written.
    """

    def __init__(self, run_dir: Path, run_info: Record) -> None:
        """Remove the event files of earlier starts: they may contain steps that are trained again."""
        from tensorboard import data_compat
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        directory = run_dir / "tensorboard"
        for path in directory.glob("events.out.tfevents.*"):
            path.unlink()
        self.make_event, self.make_scalar, self.make_value = Event, scalar_pb, data_compat.make_summary
        self.writer = EventFileWriter(str(directory))
        settings = {key: value for key, value in run_info["settings"].items() if isinstance(value, str | int | float)}
        self._write(hparams_pb(settings, trial_id=run_dir.name), step=0)
        self._write_network(directory)

    def _write(self, summary: Any, step: int, wall_time: float | None = None) -> None:
        self.writer.add_event(self.make_event(wall_time=wall_time or time.time(), step=step, summary=summary))

    def _write_network(self, directory: Path) -> None:
        from PIL import Image

        if (path := directory / NETWORK_GRAPH_FILE).exists():
            nodes = json.loads(path.read_text(encoding="utf-8"))
            self.writer.add_event(self.make_event(wall_time=time.time(), graph_def=encode_graph(nodes)))
        if (path := directory / NETWORK_INPUTS_FILE).exists():
            description = "The first training images, augmented and normalized; each channel is scaled to its own range"
            self._write_image("train/inputs", description, *Image.open(path).size, path.read_bytes(), step=0)

    def put(self, record: Record) -> None:
        """Write one record."""
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "time"):
                summary = self.make_scalar(f"{record['split']}/{key}", value)
                self._write(summary, record["step"], record.get("time"))

    def flush(self) -> None:
        """Make the records visible."""
        self.writer.flush()

    def mark_replayed(self) -> None:
        """Do nothing: the files of earlier starts are removed already."""

    def finish(self, outcome: str, summary: Record, details: Record) -> None:
        """Write the images and the outcome, and close the file. A preempted run is not at its end."""
        if outcome == "finished" and "confusion" in details and importlib.util.find_spec("matplotlib"):
            self._write_images(summary["steps"], details)
        if outcome != "preempted":
            self._write_end(outcome)
        self.writer.close()

    def _write_end(self, outcome: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        status = api_pb2.STATUS_SUCCESS if outcome == "finished" else api_pb2.STATUS_FAILURE
        content = metadata.create_summary_metadata(
            HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=time.time()))
        )  # hparams.summary.session_end_pb needs TensorFlow
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=content, tensor=metadata.NULL_TENSOR)
        self._write(Summary(value=[value]), step=0)

    def _write_images(self, step: int, details: Record) -> None:
        from distlenet.tracking.figures import confusion_figure, mistakes_figure, to_png

        figures = {"test/confusion": (confusion_figure, "Test images by label and predicted class")}
        if details["mistakes"]:
            description = "Label → prediction, confidence, index in the test set"
            figures["test/most_confident_mistakes"] = (mistakes_figure, description)
        for tag, (draw, description) in figures.items():
            self._write_image(tag, description, *to_png(draw, details), step)

    def _write_image(self, tag: str, description: str, width: int, height: int, png: bytes, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.image.metadata import create_summary_metadata

        metadata = create_summary_metadata("", description)
        value = self.make_value(tag, metadata, [str(width).encode(), str(height).encode(), png])
        self._write(Summary(value=[value]), step)
