"""What a profile file may say: the schema of device and cluster TOML files, checked with pydantic.

This is the file edge and the only part of the hardware room that imports pydantic. Every number is an
inline table `{ value = "80 GB", kind = "vendor", source = "datasheet" }`: a value with its unit (ratios and
counts are plain), a kind out of measured, vendor and assumed, and a source that is not empty. Values must
be above zero; times may be 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from rtp_sim.errors import InputError
from rtp_sim.hardware.spec import Number
from rtp_sim.units import parse_bandwidth, parse_bytes, parse_flops, parse_time_ns

KINDS = ("measured", "vendor", "assumed")
_EXAMPLE = '{ value = %s, kind = "vendor", source = "datasheet" }'


def _plain(value: object) -> float:
    """A ratio or a count: a finite number above zero without a unit."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"given {value!r}, expected a plain number, for example 0.87")
    return value


def _text(parse: Callable[[str], int]) -> Callable[[Any], float]:
    return lambda value: parse(value)


def _number(
    read: Callable[[Any], float], example: str, zero: bool = False, least: float = 0, most: float = math.inf
) -> PlainValidator:
    """A validator that turns an inline table into a `Number` above 0, from `least` to `most`."""

    def validate(raw: object) -> Number:
        shape = f"expected a table such as {_EXAMPLE % example}"
        if not isinstance(raw, dict):
            raise ValueError(f"given {raw!r}, {shape}")
        if set(raw) != {"value", "kind", "source"}:
            raise ValueError(f"given the keys {', '.join(sorted(raw)) or '(none)'}, {shape}")
        try:
            value = read(raw["value"])
        except InputError as error:
            raise ValueError(f"value: {error}") from None
        if value < 0 or (value == 0 and not zero):
            raise ValueError(f"value: given {raw['value']!r}, expected more than 0")
        if not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise ValueError(f"value: given {raw['value']!r}, expected {limit}")
        if raw["kind"] not in KINDS:
            raise ValueError(f"kind: given {raw['kind']!r}, expected one of {', '.join(KINDS)}")
        if not isinstance(raw["source"], str) or not raw["source"].strip():
            raise ValueError(f"source: given {raw['source']!r}, expected where the number comes from")
        return Number(value, raw["kind"], raw["source"])

    return PlainValidator(validate)


Bytes = Annotated[Number, _number(_text(parse_bytes), '"80 GB"')]
Bandwidth = Annotated[Number, _number(_text(parse_bandwidth), '"300 GB/s"')]
Flops = Annotated[Number, _number(_text(parse_flops), '"312 TFLOP/s"')]
Time = Annotated[Number, _number(_text(parse_time_ns), '"2.5 us"', zero=True)]
Plain = Annotated[Number, _number(_plain, "8")]
Fraction = Annotated[Number, _number(_plain, "0.87", most=1)]
Factor = Annotated[Number, _number(_plain, "1.1", least=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class KernelFile(_Model):
    """One kernel in one dtype: floor + FLOPs / `rate` + bytes / `bandwidth`; a part that is left out is none."""

    name: str
    dtype: str
    floor: str
    rate: str | None = None
    bandwidth: str | None = None
    kind: str = Field(pattern="^(measured|vendor|assumed)$")
    source: str = Field(min_length=1)


class DeviceFile(_Model):
    """A device profile; `scale_up_bandwidth` and `pcie_bandwidth` (one direction) serve the generic
    cluster.
    """

    description: str
    compute_units: Plain
    memory: Bytes
    memory_bandwidth: Bandwidth
    peak_flops: dict[str, Flops] = Field(min_length=1)
    matmul_efficiency: Fraction
    attention_efficiency: Fraction
    memory_efficiency: Fraction
    kernel_floor: Time
    host_issue: Time
    overlap_slowdown: Factor
    runtime_reserved: Bytes
    tdp_w: Plain | None = None
    price_usd_per_hour: Plain | None = None
    scale_up_bandwidth: Bandwidth | None = None
    pcie_bandwidth: Bandwidth | None = None
    communication_issue: Time | None = None
    blocking_issue: Time | None = None
    host_pace: Time | None = None
    kernels: list[KernelFile] = []


class LinkFile(_Model):
    """A class of links: raw one-direction bandwidth, the fraction that transfers reach, latency of one
    link.
    """

    kind: str
    bandwidth: Bandwidth
    efficiency: Fraction
    latency: Time
    duplex: bool = True


class IntraFile(_Model):
    """Wires of one class: a `hub` with each of its `members`, or `pairs` such as "gpu0-gpu3 x2".

    Members may be runs, "gpu0..3". All traffic through a hub with `through` also shares one link of that
    class.
    """

    link: str
    hub: str | None = None
    members: list[str] = []
    pairs: list[str] = []
    through: str | None = None


class NicsFile(_Model):
    """`count` NICs of class `link` (towards the fabric), dealt out evenly and in order over `attached_to`."""

    count: int = Field(ge=1)
    link: str
    attach_link: str
    attached_to: list[str] = Field(min_length=1)


class FabricFile(_Model):
    """Leaf switches: `kind` "rails" (port i of every node meets at leaf i) or "leaf" (one leaf for all
    ports).
    """

    kind: str = Field(pattern="^(rails|leaf)$")
    nodes_per_leaf: int = Field(ge=1)
    oversubscription: Factor
    trunk_latency: Time


class CurveFile(_Model):
    """(message bytes, fraction of the bandwidth reached), ascending, with one provenance for all points."""

    points: list[tuple[str, float]] = Field(min_length=1)
    kind: str = Field(pattern="^(measured|vendor|assumed)$")
    source: str = Field(min_length=1)


class NodesFile(_Model):
    """(nodes, fraction of the wires' raw bandwidth), ascending, with one provenance for all points."""

    points: list[tuple[int, float]] = Field(min_length=1)
    kind: str = Field(pattern="^(measured|vendor|assumed)$")
    source: str = Field(min_length=1)


class KindFile(_Model):
    """A kind of collective measured by itself; see `spec.KindParams`."""

    step: Time
    efficiency: Fraction


class HostFile(_Model):
    """The cores that ranks on CPUs share; see `spec.HostParams`."""

    cores: Plain
    core_time_per_megabyte: Time


class CommunicationFile(_Model):
    """The communication library; see `spec.CommunicationParams`."""

    p2p_base: Time
    p2p_efficiency: Fraction
    collective_base: Time
    collective_step_intra: Time
    collective_step_inter: Time
    algorithms: list[str] = Field(min_length=1)
    size_curve: CurveFile | None = None
    in_switch_reduction_min_ranks: Plain | None = None
    in_switch_base: Time | None = None
    in_switch_efficiency: Fraction | None = None
    collective_chunk_inter: Time | None = None
    message_stall: Time | None = None
    message_stall_nodes: Plain | None = None
    all_reduce_nodes: NodesFile | None = None
    kinds: dict[str, KindFile] = {}


class CalibrationFile(_Model):
    """What was fitted on this machine, with its software: replaces the device profile's numbers of the same names."""

    matmul_efficiency: Fraction | None = None
    matmul_efficiency_fp32: Fraction | None = None
    attention_efficiency_fp32: Fraction | None = None
    matmul_efficiency_ragged: Fraction | None = None
    attention_efficiency: Fraction | None = None
    memory_efficiency: Fraction | None = None
    kernel_floor: Time | None = None
    host_issue: Time | None = None
    host_issue_backward: Time | None = None
    message_issue: Time | None = None
    blocking_issue: Time | None = None
    overlap_slowdown: Factor | None = None
    runtime_reserved: Bytes | None = None
    link_efficiency: dict[str, Fraction] = {}
    """For links of the profile, by name: in place of their efficiency."""
    collective_chunk_inter: Time | None = None
    collective_turn_piped: Time | None = None
    """In place of those of the communication library (`spec.CommunicationParams`)."""
    residual_p10: Plain | None = None
    residual_p90: Plain | None = None
    """Measured / predicted step time: what a tenth of the rows behind the fit is below, and above."""


class ClusterFile(_Model):
    """A cluster profile: one node's wiring, the fabric between nodes and the communication library.

    A profile with `like` at its top holds only what differs from the profile of that name (`profiles.py`).
    """

    description: str
    device: str
    calibration: CalibrationFile = CalibrationFile()
    gpus_per_node: int = Field(ge=1)
    notes: list[str] = []
    links: dict[str, LinkFile] = {}
    intra: list[IntraFile] = []
    nics: NicsFile | None = None
    fabric: FabricFile | None = None
    communication: CommunicationFile
    host: HostFile | None = None


File = TypeVar("File", bound=_Model)


def validated(model: type[File], raw: dict[str, Any], path: Path) -> File:
    """`raw` as `model`. Raises InputError naming the file, the key, what it holds and what was expected."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(f"{path}: {key}: {_reason(model, first)}{more}") from None


def _reason(model: type[_Model], error: Any) -> str:
    """One mistake in the words of the other errors."""
    if error["type"] == "missing":
        return "missing, expected this key; see the profiles that come with rtp-sim for examples"
    if error["type"] == "extra_forbidden":
        known = f" one of {', '.join(model.model_fields)}" if len(error["loc"]) == 1 else " no such key here"
        return f"given an unknown key, expected{known}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"given {error['input']!r}: {message}"
