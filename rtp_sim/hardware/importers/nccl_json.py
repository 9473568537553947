"""What nccl-tests write with -J FILE: one run as JSON (their src/util.cu, versions 1 and 2 of the format).

The object holds "args", "config" (with "nthreads", "ngpus" and "devices") and "results", a list of sizes with
"out_of_place" and "in_place" (null where not measured). A process lists only its first device there, so ranks are
counted as devices x nthreads x ngpus.
"""

from __future__ import annotations

import json
from typing import Any

from rtp_sim.errors import InputError
from rtp_sim.hardware.importers.sweeps import PROGRAM, Bandwidths, Device, Row, Sweep, kind_of, ranks_of

Json = Any  # what json.loads returns


def parse_json(text: str, name: str) -> list[Sweep]:
    """The table of one run. InputError naming the key, what it holds and what was expected."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}: line {error.lineno}, column {error.colno}: {error.msg}; expected the JSON that nccl-tests write "
            "with -J: the file may be cut off"
        ) from None
    if not isinstance(data, dict) or not isinstance(data.get("results"), list):
        keys = ", ".join(list(data)[:6]) if isinstance(data, dict) else type(data).__name__
        raise InputError(
            f'{name}: found {keys}; expected an object with "config" and "results", as nccl-tests -J writes'
        )
    rows: list[Row] = []
    bandwidths: list[Bandwidths] = []
    for number, result in enumerate(data["results"], 1):
        row = _row(result, number, f"{name}: results[{number - 1}]", bandwidths)
        rows += [row] if row.size_bytes > 0 else []
    if not rows:
        raise InputError(f"{name}: results is empty; expected an entry for each message size")
    devices = _devices(data.get("config"), name)
    args = data.get("args")
    found = PROGRAM.search(" ".join(str(a) for a in args[:1])) if isinstance(args, list) else None
    redop = str(data["results"][0].get("redop") or "")
    kind = kind_of(found[1] if found else "", name, redop, bandwidths, name)
    return [Sweep(name, 1, kind, ranks_of(kind, len(devices), bandwidths, name), devices, tuple(rows))]


def _row(result: Json, number: int, where: str, bandwidths: list[Bandwidths]) -> Row:
    if not isinstance(result, dict):
        raise InputError(f"{where} is {result!r}; expected an object with size, out_of_place and in_place")
    size = result.get("size")
    if type(size) is not int or size < 0:
        raise InputError(f"{where}: size is {size!r}; expected bytes")
    times = [_time_us(result, part, number, where, bandwidths) for part in ("out_of_place", "in_place")]
    if times == [None, None]:
        raise InputError(f"{where}: neither out_of_place nor in_place is there; expected at least one")
    return Row(number, size, str(result.get("type", "")), times[0], times[1])


def _time_us(result: Json, part: str, number: int, where: str, bandwidths: list[Bandwidths]) -> float | None:
    found = result.get(part)
    if found is None:
        return None
    if isinstance(found, dict) and "cpu_time" in found:
        raise InputError(f"{where}: {part} holds the time of the CPU (-C); expected a run without -C")
    values: list[Any] = [found.get(key) for key in ("time", "alg_bw", "bus_bw")] if isinstance(found, dict) else []
    if len(values) != 3 or not all(type(v) in (int, float) for v in values) or not values[0] > 0:
        raise InputError(f"{where}: {part} is {found!r}; expected numbers for time (more than 0), alg_bw and bus_bw")
    if found.get("nwrong"):
        raise InputError(
            f"{where}: {part} has {found['nwrong']:g} wrong values; expected 0: a run with wrong results is nothing to "
            "go by"
        )
    bandwidths.append(Bandwidths(number, float(values[1]), float(values[2])))
    return float(values[0])


def _devices(config: Json, name: str) -> tuple[Device, ...]:
    """One entry per rank."""
    if not isinstance(config, dict) or not isinstance(config.get("devices"), list) or not config["devices"]:
        raise InputError(f'{name}: "config" has no "devices"; expected one entry per process, as nccl-tests -J writes')
    each = [config.get(key, 1) for key in ("nthreads", "ngpus")]
    if not all(type(n) is int and n >= 1 for n in each):
        raise InputError(
            f"{name}: config has nthreads {each[0]!r} and ngpus {each[1]!r}; expected whole numbers from 1"
        )
    devices: list[Device] = []
    for i, entry in enumerate(config["devices"]):
        keys = {"hostname": str, "device": int, "group": int, "device_info": str}
        for key, kind in keys.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise InputError(f"{name}: config.devices[{i}] is {entry!r}; expected {', '.join(keys)}")
        if entry["group"]:
            raise InputError(
                f"{name}: config.devices[{i}] is of group {entry['group']}; several groups ran at once "
                "(NCCL_TESTS_SPLIT), expected one group only"
            )
        for more in range(each[0] * each[1]):
            devices.append(Device(len(devices), entry["hostname"], entry["device"] + more, entry["device_info"]))
    return tuple(devices)
