"""All exporters by name, and what they make of one plan: `Settings`, or the sentence that says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rtp_sim.errors import InputError
from rtp_sim.experiment import Setting
from rtp_sim.export.accelerate import accelerate
from rtp_sim.export.command import run_command
from rtp_sim.export.deepspeed import deepspeed
from rtp_sim.export.megatron import megatron
from rtp_sim.export.settings import NotExpressible, Settings
from rtp_sim.export.torchtitan import torchtitan
from rtp_sim.text import nearest

TARGETS: Mapping[str, Callable[[Setting], Settings]] = {
    "run": run_command,
    "megatron": megatron,
    "torchtitan": torchtitan,
    "deepspeed": deepspeed,
    "accelerate": accelerate,
}


def targets_of(text: str) -> list[str]:
    """The names in "megatron,run", or all of them for "all". InputError for one there is not."""
    names = list(TARGETS) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TARGETS:
            raise InputError(f"--to {text}: unknown target {name!r}: {nearest(name, TARGETS)}")
    if not names:
        raise InputError(f"--to {text!r} names no target; expected all or some of {', '.join(TARGETS)}")
    return list(dict.fromkeys(names))


def export(setting: Setting, targets: Iterable[str] = tuple(TARGETS)) -> dict[str, Settings | str]:
    """What each target is given, or why it cannot do this."""
    found: dict[str, Settings | str] = {}
    for name in targets:
        try:
            found[name] = TARGETS[name](setting)
        except NotExpressible as reason:
            found[name] = str(reason)
    return found
