"""Numbers of a profile replaced for one load, by dotted keys: "link.ib.bandwidth" = "400 Gb/s", say.

    link.NAME.FIELD      of every link class called NAME in the profile, or of that kind (nvlink, nic ...; ib is nic)
    device.FIELD         of the device profile, also device.peak_flops.bf16
    TABLE.FIELD          of the cluster profile: communication, fabric, calibration, host

A number that calibration would put over the one that is changed gives way. Keys that the profile does not have are an
error that names what comes nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtp_sim.errors import InputError
from rtp_sim.text import nearest

Table = dict[str, Any]

KIND_WORDS = {"ib": "nic", "network": "nic"}
"""Other words for kinds of links."""
FREE_TABLES = ("calibration", "communication", "host", "fabric")
"""Tables whose optional numbers a profile may leave out; the schema says which exist."""


def changed(cluster: Table, device: Table, changes: Mapping[str, Any], path: Path) -> None:
    """Puts `changes` into the raw tables of a cluster file and its device file. InputError for unknown keys."""
    for key, value in changes.items():
        head, *rest = key.split(".")
        if head in ("link", "links"):
            _change_links(cluster, key, rest, value, path)
        elif head == "device" and rest:
            _put(device, rest, value, key, path, optional=len(rest) == 1)
            if len(rest) == 1:
                cluster.get("calibration", {}).pop(rest[0], None)
        elif head in FREE_TABLES and rest:
            _put(cluster.setdefault(head, {}), rest, value, key, path, optional=True)
        else:
            known = ", ".join(["link.NAME.FIELD", "device.FIELD", *(f"{table}.FIELD" for table in FREE_TABLES)])
            raise InputError(f"{path}: given the change {key!r}, expected one of the profile's numbers: {known}")


def _change_links(cluster: Table, key: str, rest: list[str], value: Any, path: Path) -> None:
    links = cluster.get("links", {})
    if len(rest) != 2:
        raise InputError(
            f"{path}: given the change {key!r}, expected link.NAME.FIELD, for example link.nvlink.bandwidth"
        )
    name, field = rest
    kind = KIND_WORDS.get(name, name)
    found = [name] if name in links else [n for n, link in links.items() if link.get("kind") == kind]
    if not found:
        raise InputError(
            f"{path}: {key}: unknown link {name!r}: {nearest(name, [*links, *(x['kind'] for x in links.values())])}"
        )
    for each in found:
        links[each] = dict(links[each])
        _put(links[each], [field], value, key, path, optional=False)
        if field == "efficiency":
            cluster.get("calibration", {}).get("link_efficiency", {}).pop(each, None)


def _put(table: Table, names: list[str], value: Any, key: str, path: Path, *, optional: bool) -> None:
    """Replaces the number at `names` below `table`; one that is not there only if it is `optional`."""
    *tables, name = names
    for part in tables:
        table[part] = dict(table.get(part, {}))
        table = table[part]
    if name in table and not _is_number(table[name]):
        raise InputError(f"{path}: {key}: is no number of the profile, expected one such as "
                         f"{', '.join(n for n, v in table.items() if _is_number(v)) or '(none)'}")  # fmt: skip
    if name not in table and not optional:
        raise InputError(f"{path}: {key}: unknown number {name!r}: {nearest(name, [n for n in table if n != 'kind'])}")
    table[name] = {"value": value, "kind": "assumed", "source": "given with the load"}


def _is_number(value: Any) -> bool:
    return isinstance(value, dict) and "value" in value and "kind" in value
