"""Every example prints exactly what is stored beside it: NAME.py, NAME.out. The README shows what the demo prints.

After a change that is meant to move the numbers, `python tests/test_examples.py` stores the new outputs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
DEMO = {
    # The line of the README before each block -> the command in the Makefile that prints it.
    "compare": "compare --model gpt2-xl --cluster dgx-a100-80g --gpus 8 "
    "--strategies rtp,rtp-inplace,ddp,zero1,fsdp,tp,tp-sp --micro-batch 4 --seq-len 1024 --precision fp16",
    "simulate": "simulate --model llama2-7b --cluster dgx-h100 --nodes 2 --strategy rtp --rtp 8 --dp 2 --seq-len 4096",
}


def output(*command: str) -> str:
    """What a Python process prints. AssertionError if it fails or writes to stderr."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def demo(name: str) -> str:
    """What a command of the demo prints, without blanks at the ends of lines."""
    text = output("-m", "rtp_sim", *DEMO[name].split(), "--quiet")
    return "\n".join(line.rstrip() for line in text.splitlines())


def block(name: str) -> re.Pattern[str]:
    """A block of the README between its marks."""
    return re.compile(rf"(<!-- output of {name} -->\n```text\n)(.*?)(\n```\n)", re.DOTALL)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_is_stored(script: Path):
    assert output(str(script)) == script.with_suffix(".out").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DEMO)
def test_the_readme_shows_what_the_demo_prints(name: str):
    found = block(name).search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2] == demo(name)


def test_the_makefile_runs_the_commands_that_the_readme_shows():
    makefile = re.sub(r"\s*\\\n\s*", " ", (ROOT / "Makefile").read_text(encoding="utf-8"))
    for command in DEMO.values():
        assert command in makefile


def test_every_example_is_named_in_the_readme():
    text = README.read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES if f"examples/{path.name}" not in text] == []


def store() -> None:
    """Writes what the examples and the demo print now."""
    for script in EXAMPLES:
        script.with_suffix(".out").write_text(output(str(script)), encoding="utf-8")
        print(f"stored {script.stem}.out")
    text = README.read_text(encoding="utf-8")
    for name in DEMO:
        shown = demo(name)
        text = block(name).sub(lambda found, shown=shown: found[1] + shown + found[3], text)
    README.write_text(text, encoding="utf-8")
    print("stored the demo's output in README.md")


if __name__ == "__main__":
    store()
