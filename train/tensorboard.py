"""What TensorBoard shows of a run: an event file, written as metrics come, with TensorBoard's own library.

- Written at once, not by a thread: a full disk is then an error here, and nothing waits for what can't be written.
- A session begins with the mark START at its first step, at which TensorBoard forgets that step and all after it: steps
  that a resumed run does again are there once.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivcore.errors import TrainingError
from train.run_folder import EVALUATIONS

FOLDER = "tensorboard"
VERSION = "brain.Event:2"
"""The form of the files; from this one on, START is heeded."""

LARGEST = 3.4028234663852886e38
"""Of float32, in which scalars are written."""


class TensorBoard:
    """Writes a run's metrics to RUN/tensorboard, as `train/NAME`, and its evaluations, as `held_out/KIND`.

    Raises TrainingError where the library is not installed.
    """

    def __init__(self, run: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer import record_writer
        except ImportError:
            raise TrainingError(
                "--tensorboard needs the package tensorboard: pip install 'ivmlx[tensorboard]'."
            ) from None
        self._proto, self._records = event_pb2, record_writer
        self._run = run
        self._file: Path | None = None
        self._read = 0

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step's metrics, and its evaluation where there is one; TrainingError when they cannot be written."""
        values = {f"train/{name}": value for name, value in metrics.items() if _is_number(value)}
        values |= {f"held_out/{kind}": value for kind, value in self._evaluation(step).items()}
        proto, now, events = self._proto, time.time(), []
        if self._file is None:
            self._file = self._run / FOLDER / _file_name(step)
            start = proto.SessionLog(status=proto.SessionLog.START)
            events = [
                proto.Event(wall_time=now, file_version=VERSION),
                proto.Event(wall_time=now, step=step, session_log=start),
            ]
        event = proto.Event(wall_time=now, step=step)
        for tag, value in values.items():
            event.summary.value.add(tag=tag, simple_value=min(max(value, -LARGEST), LARGEST))
        try:
            self._file.parent.mkdir(exist_ok=True)
            with self._file.open("ab") as stream:
                writer = self._records.RecordWriter(stream)
                for each in (*events, event):
                    writer.write(each.SerializeToString())
        except OSError as error:
            raise TrainingError(f"{self._file} cannot be written ({error.strerror}).") from None

    def _evaluation(self, step: int) -> dict[str, float]:
        """Of this step, by kind, with the mean; read when the file has changed."""
        file = self._run / EVALUATIONS
        size = file.stat().st_size if file.exists() else 0
        if size == self._read:
            return {}
        self._read = size
        last = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
        if last["step"] != step:
            return {}
        return {"mean": last["mean"], **{name: kind["value"] for name, kind in last["kinds"].items()}}


def _file_name(step: int) -> str:
    """TensorBoard reads files in the order of their names; two of one second are in that of their steps."""
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{step:09d}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
