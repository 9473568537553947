"""What workers of the sweep's tests do: importable by their processes, counted in a file, some of them deadly."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from rtp_sim.experiment import Request
from rtp_sim.sweep.axes import Axis, axis_of
from rtp_sim.sweep.evaluate import Answer
from rtp_sim.sweep.evaluate import evaluate as really
from rtp_sim.sweep.points import Point

FOLDER = "SWEEP_TEST_FOLDER"
"""Environment variable: where calls are counted."""


def tiny_grid(batches: int = 3) -> tuple[list[Axis], list[Point]]:
    """micro-batch x strategy of the smallest model on 2 GPUs."""
    axes = [axis_of("micro-batch", [str(n + 1) for n in range(batches)]), axis_of("strategy", ["ddp", "fsdp"])]
    points = [
        Point((batch.text, strategy.text), Request("gpt2-tiny", "dgx-a100-80g", strategy.text, gpus=2,
                                                   micro_batch=int(batch.text)))
        for batch in axes[0].values
        for strategy in axes[1].values
    ]  # fmt: skip
    return axes, points


def _note(point: Point) -> int:
    """Writes the call down; how often this point was called, this time included."""
    path = Path(os.environ[FOLDER]) / "-".join(point.at)
    with path.open("a", encoding="utf-8") as file:
        file.write("x")
    return path.stat().st_size


def calls() -> dict[str, int]:
    """Calls by point."""
    return {path.name: path.stat().st_size for path in sorted(Path(os.environ[FOLDER]).iterdir())}


def counted(point: Point) -> Answer:
    """The real thing, counted."""
    _note(point)
    return really(point)


def deadly_once(point: Point) -> Answer:
    """The worker dies at the first try of 2-ddp."""
    if _note(point) == 1 and point.at == ("2", "ddp"):
        os.kill(os.getpid(), signal.SIGKILL)
    return really(point)


def deadly(point: Point) -> Answer:
    """The worker dies at every try of 2-ddp."""
    _note(point)
    if point.at == ("2", "ddp"):
        os.kill(os.getpid(), signal.SIGKILL)
    return really(point)


def raising(point: Point) -> Answer:
    """Breaks for 2-ddp."""
    _note(point)
    if point.at == ("2", "ddp"):
        raise ZeroDivisionError("of the test")
    return really(point)


class Here(Executor):
    """Computes at once, in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class InThisProcess:
    """A scheduler without processes."""

    width, deaths, die_together = 2, 3, False
    died: tuple[type[BaseException], ...] = ()
    lost: tuple[type[BaseException], ...] = ()

    def executor(self) -> Executor:
        return Here()

    def broken(self) -> None:
        raise AssertionError("nothing can break here")

    def close(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit("imported by tests")
