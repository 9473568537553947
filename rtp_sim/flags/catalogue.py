"""Flags of hardware and models: what there is, all about one, and profiles made of what tools print."""

from __future__ import annotations

import argparse


def hardware(p: argparse.ArgumentParser) -> None:
    """`hardware list`, `hardware show` and `hardware import`."""
    actions = _list_and_show(p, "hardware")
    _import(actions.add_parser("import", help="a cluster profile from nvidia-smi topo -m and nccl-tests"))


def models(p: argparse.ArgumentParser) -> None:
    """`models list` and `models show`."""
    _list_and_show(p, "models")


def _list_and_show(p: argparse.ArgumentParser, what: str) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    actions = p.add_subparsers(title="actions", required=True, metavar="ACTION")
    lister = actions.add_parser("list", help=f"all {what}")
    lister.set_defaults(run=f"{what}_list")
    shower = actions.add_parser("show", help="everything about one")
    shower.set_defaults(run=f"{what}_show")
    shower.add_argument("name")
    for sub in (lister, shower):
        sub.add_argument("--format", choices=("table", "json"), default="table")
    return actions


def _import(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="hardware_import")
    p.epilog = "Writes FILE.toml and, with --nccl-tests, FILE.import.json. docs/calibration.md says what is fitted."
    p.add_argument("--topo", required=True, metavar="FILE", help="what nvidia-smi topo -m prints on one node")
    p.add_argument("--nccl-tests", nargs="+", action="extend", default=[], metavar="FILE",
                   help="what nccl-tests print, or write with -J: sweeps of one or several nodes")  # fmt: skip
    p.add_argument("--device", required=True, metavar="NAME|FILE", help="device profile of the GPUs")
    p.add_argument("--nic", metavar="RATE", help='speed of a NIC, for example "200Gb/s" (the topology does not say)')
    p.add_argument("--like", metavar="NAME", help="cluster profile that lends what was not measured")
    p.add_argument("-o", "--output", required=True, metavar="FILE.toml", help="the cluster profile to write")
    p.add_argument("--format", choices=("table", "json"), default="table")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
