"""The arrows of ARCHITECTURE.md: which room may import which, and where the outside libraries may appear.

Imports count wherever they stand, also inside functions and for type checking.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / "rtp_sim").rglob("*.py"))
}

BASE = {"", "errors", "text", "units", "schedule.ir"}
# room -> the rooms it may import. A module is in the room with the longest name that it starts with.
MAY_IMPORT = {
    "errors": set(),
    "text": set(),
    "units": {"errors"},
    "schedule.ir": set(),
    "link": {"errors"},
    "stated": BASE,
    "model": BASE,
    "hardware": BASE,
    "schedule": BASE | {"model", "hardware"},
    "timeline": {"schedule.ir"},
    "engine.costs": {"schedule.ir"},
    "cost": BASE | {"link", "stated", "model", "hardware", "engine.costs"},
    "engine": BASE | {"timeline", "engine.costs"},
    "metrics": BASE | {"timeline", "engine"},
    "experiment": BASE | {"model", "hardware", "schedule", "timeline", "cost", "engine", "metrics"},
    "jitter": BASE | {"timeline", "engine", "metrics", "experiment"},
    "compose": BASE
    | {"model", "hardware", "schedule", "timeline", "cost", "engine.costs", "engine", "metrics", "experiment"},
    "planner": BASE
    | {"model", "hardware", "schedule", "cost", "engine", "metrics", "experiment", "compose"},
    "traces": BASE,
    "validation": BASE
    | {"link", "stated", "model", "hardware", "schedule", "timeline", "timeline_file", "cost", "engine", "metrics"}
    | {"engine.costs", "experiment", "compose", "executor.pace"},
    "validation.traced": BASE | {"timeline", "traces", "validation", "executor.rendezvous"},
    "sweep": BASE | {"model", "hardware", "metrics", "experiment", "compose"},
    "report": BASE
    | {"hardware", "schedule", "timeline", "engine", "metrics", "experiment", "validation", "traces"}
    | {"sweep", "jitter", "planner"},
    "importing": BASE
    | {"hardware", "cost", "executor.calibrate", "executor.calibrate.fit", "executor.calibrate.residuals"},
    "export": BASE | {"model", "hardware", "schedule", "experiment"},
    "commands_export": BASE | {"experiment", "export", "planner", "report"},
    "commands_plan": BASE | {"hardware", "experiment", "planner", "commands_export", "report"},
    "commands_import": BASE | {"hardware", "importing"},
    "commands_trace": BASE | {"timeline_file", "traces", "validation", "validation.traced", "report"},
    "timeline_file": BASE | {"schedule", "timeline"},
    "commands": BASE
    | {"model", "hardware", "schedule", "timeline", "engine", "metrics", "experiment", "compose", "report"}
    | {"jitter", "commands_run", "commands_export"},
    "commands_run": BASE
    | {"stated", "model", "hardware", "cost", "schedule", "timeline", "experiment", "report", "executor"},
    "commands_validate": BASE
    | {"hardware", "timeline", "timeline_file", "validation", "validation.traced", "report"},
    "commands_measured": BASE | {"validation", "report"},
    "commands_sweep": BASE | {"hardware", "schedule", "commands", "sweep", "report"},
    "commands_decisions": BASE | {"validation", "report", "commands_measured"},
    "flags": BASE | {"model"},
    "cli": {
        "", "errors", "flags",
        "commands", "commands_validate", "commands_calibrate", "commands_import", "commands_trace",
        "commands_measured", "commands_sweep", "commands_decisions", "commands_plan",
    },
    "executor": BASE
    | {"link", "stated", "model", "schedule", "timeline", "timeline_file", "executor.rendezvous", "executor.pace"}
    | {"traces"},
    # When transfers began follows from the times of all ranks, whoever measured them.
    "executor.rendezvous": BASE | {"timeline"},
    # Read beside every step, and compared with that of the profile.
    "executor.pace": BASE,
    "executor.calibrate": BASE | {"model", "executor", "executor.pace"},
    # What turns times into parameters and checks them runs where the simulator is, not on the ranks.
    "executor.calibrate.fit": BASE | {"model", "hardware", "cost", "executor.calibrate"},
    "executor.calibrate.residuals": BASE | {"model", "hardware", "cost", "engine", "executor.calibrate"},
    "executor.calibrate.write": BASE
    | {"hardware", "executor.calibrate", "executor.calibrate.fit", "executor.calibrate.residuals"},
    "commands_calibrate": BASE
    | {
        "experiment",
        "model",
        "hardware",
        "executor.calibrate",
        "executor.calibrate.fit",
        "executor.calibrate.residuals",
        "executor.calibrate.write",
    },
    "__main__": {"cli"},
    "": set(),
}

# library -> the modules that may import it.
CONFINED = {
    "simpy": {"rtp_sim.engine.simulate"},
    "torch": {module for module in FILES if module.startswith("rtp_sim.executor.") and module.count(".") == 2}
    | {module for module in FILES if module.startswith("rtp_sim.executor.twins.") and "__init__" not in module}
    | {f"rtp_sim.executor.calibrate.{name}" for name in ("host", "kernels", "probe", "transfers", "worker")},
    "networkx": {"rtp_sim.hardware.topology", "rtp_sim.hardware.picture"},
    "pydantic": {
        "rtp_sim.hardware.files",
        "rtp_sim.model.huggingface",
        "rtp_sim.model.json_file",
        "rtp_sim.model.network_file",
        "rtp_sim.validation.measured",
        "rtp_sim.validation.runs",
    },
    "rich": {
        "rtp_sim.commands", "rtp_sim.commands_run", "rtp_sim.report.tables", "rtp_sim.report.diff_tables",
        "rtp_sim.report.sweep_tables", "rtp_sim.report.plan_tables",
    },
    "distributed": {"rtp_sim.sweep.schedulers"},
    "matplotlib": {"rtp_sim.report.plots"},
}
NO_LIBRARIES = ("rtp_sim.schedule.ir", "rtp_sim.schedule.serialize", "rtp_sim.schedule.text")


def room_of(module: str) -> str:
    """The room of a module: of rtp_sim.schedule.ir "schedule.ir", of rtp_sim.schedule.build "schedule"."""
    name = module.removeprefix("rtp_sim").removeprefix(".")
    fitting = [room for room in MAY_IMPORT if name == room or (room and name.startswith(room + "."))]
    assert fitting, f"{module} is in no room: add it to ARCHITECTURE.md and to this test"
    return max(fitting, key=len)


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that `module` imports, those of rtp_sim down to the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            source = node.module or ""
            inside = {f"{source}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= inside or {source}
    return frozenset(name.removesuffix(".__init__") for name in found)


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_arrows(module: str):
    room = room_of(module.removesuffix(".__init__"))
    for imported in imports(module):
        if imported.split(".")[0] == "rtp_sim":
            target = room_of(imported)
            assert target == room or target in MAY_IMPORT[room], f"{module} must not import {imported}"


def test_the_arrows_have_no_circle():
    left = {room: set(targets) - {room} for room, targets in MAY_IMPORT.items()}
    while left:
        free = {room for room, targets in left.items() if not targets & left.keys()}
        assert free, f"circle among {sorted(left)}"
        left = {room: targets for room, targets in left.items() if room not in free}


@pytest.mark.parametrize("library", CONFINED)
def test_outside_libraries_stay_where_they_are(library: str):
    users = {module for module in FILES if any(name.split(".")[0] == library for name in imports(module))}
    assert users <= CONFINED[library]


def test_the_schedule_ir_needs_the_standard_library_only():
    outside = {name.split(".")[0] for name in imports("rtp_sim.schedule.ir")} - sys.stdlib_module_names
    assert outside == set()


@pytest.mark.parametrize("module", NO_LIBRARIES)
def test_schedules_are_read_without_any_library(module: str):
    """As on a machine that has nothing but torch: any import of another library fails."""
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in sys.stdlib_module_names | {{"rtp_sim"}}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import {module}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_schedules_run_where_there_is_nothing_but_torch():
    """What executes imports neither the simulator's libraries nor the rooms that need them."""
    code = """
import sys
for name in ("simpy", "pydantic", "rich", "matplotlib"):
    sys.modules[name] = None
from rtp_sim.executor import batches, dense, distributed, machine, reference
rooms = ("hardware", "cost", "engine", "report", "experiment")
print([m for m in sys.modules for room in rooms if m.startswith("rtp_sim." + room)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_ranks_that_only_sleep_do_without_torch():
    code = "import sys; sys.modules['torch'] = None; import rtp_sim.executor.worker, rtp_sim.executor.sleepers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_document_names_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for module in FILES:
        top = module.split(".")[1] if "." in module else ""
        if top.strip("_") not in ("", "init", "main"):
            assert f"`{top}" in text, f"ARCHITECTURE.md does not name {top}"
