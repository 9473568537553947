"""Files of nccl-tests, as text or JSON, told apart by their first character."""

from __future__ import annotations

from pathlib import Path

from rtp_sim.errors import InputError
from rtp_sim.hardware.importers.nccl_json import parse_json
from rtp_sim.hardware.importers.nccl_text import parse_text
from rtp_sim.hardware.importers.sweeps import Sweep


def read_sweeps(path: Path) -> list[Sweep]:
    """All tables in a file. InputError naming the file and the place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(
            f"{path}: cannot be read: {reason}; expected what nccl-tests print, or write with -J"
        ) from None
    return parse_json(text, str(path)) if text.lstrip().startswith(("{", "[")) else parse_text(text, str(path))
