"""Which directory of checkpoints holds which: `DIR/step-00000006` is complete, `DIR/step-00000006.partial` is not.

A checkpoint is written under the partial name and renamed once every rank has written its part, so a save that is cut
off leaves the earlier ones as they are. Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from rtp_sim.errors import InputError

METADATA = ".metadata"
"""The file without which torch.distributed.checkpoint reads nothing; it is written last."""

_NAME = re.compile(r"step-(\d{8})")


def complete_steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in the directory, in order; empty if it does not exist."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        named = _NAME.fullmatch(path.name)
        if named and (path / METADATA).is_file():
            found.append(int(named[1]))
    return sorted(found)


def step_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after that many steps lies."""
    return directory / f"step-{step:08d}"


def newest(directory: Path) -> Path:
    """The directory itself if it is a checkpoint, else the newest complete one in it. InputError if there is none."""
    if not directory.is_dir():
        raise InputError(f"--load {directory}: there is no such directory")
    if (directory / METADATA).is_file():
        return directory
    steps = complete_steps(directory)
    if not steps:
        partial = sorted(p.name for p in directory.glob("step-*.partial"))
        cut = f" (only {', '.join(partial)}, which was cut off)" if partial else ""
        raise InputError(f"--load {directory}: no complete checkpoint in it{cut}; expected step-... as --save leaves")
    return step_path(directory, steps[-1])


def require_room(directory: Path, first_step: int) -> None:
    """Makes the directory. InputError if it cannot be written to, or holds checkpoints of later steps than
    `first_step`: they are of another run, and --load would take them for the newest of this one."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--save {directory}: {error.strerror}; expected a directory that can be written to") from None
    if not os.access(directory, os.W_OK):
        raise InputError(f"--save {directory}: no permission to write there")
    later = [step for step in complete_steps(directory) if step > first_step]
    if later:
        raise InputError(
            f"--save {directory}: it holds a checkpoint after step {later[-1]} already, and this run starts after step "
            f"{first_step}; go on from there with --load {directory}, or give another directory"
        )


def begin(directory: Path, step: int) -> Path:
    """An empty directory for a checkpoint to be written to; what an earlier attempt left there is removed."""
    partial = step_path(directory, step).with_suffix(".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def complete(partial: Path) -> Path:
    """Gives a checkpoint that has been written its name."""
    target = partial.with_suffix("")
    if target.exists():
        # Not complete, or it would have been refused at the start.
        shutil.rmtree(target)
    partial.rename(target)
    _to_disk(target.parent)
    return target


def _to_disk(directory: Path) -> None:
    """Has the system write down the names in a directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
