# make demo: the main job on this machine, no GPU needed.   make test: lint, types and every test.
# Needs Python >= 3.11 and make; nothing is installed outside this folder.

PYTHON ?= python3
DEMO := .venv
TEST := .venv-test
PIP := -m pip install -qq --disable-pip-version-check --no-warn-script-location

.PHONY: help demo test lint types browser pytest benchmarks clean

help:
	@echo "make demo        compare seven strategies, simulate a 16-GPU step, write a report and a trace to demo-out/"
	@echo "make test        lint, types and every test, in an environment of its own (has torch)"
	@echo "make benchmarks  how fast the simulator is, against its targets"
	@echo "make clean       remove what these made"

demo: $(DEMO)/installed
	@mkdir -p demo-out
	@echo "== Seven strategies: GPT-2 XL on 8 A100s, 4 sequences of 1,024 tokens per GPU =="
	@$(DEMO)/bin/rtp-sim compare --model gpt2-xl --cluster dgx-a100-80g --gpus 8 \
	    --strategies rtp,rtp-inplace,ddp,zero1,fsdp,tp,tp-sp --micro-batch 4 --seq-len 1024 --precision fp16 \
	    --report demo-out/compare.html --quiet
	@echo
	@echo "== One step in detail: Llama-2 7B on 2 nodes of 8 H100s, rings of 8, 2 replicas =="
	@$(DEMO)/bin/rtp-sim simulate --model llama2-7b --cluster dgx-h100 --nodes 2 --strategy rtp --rtp 8 --dp 2 \
	    --seq-len 4096 --trace demo-out/llama2-7b.json --report demo-out/llama2-7b.html --quiet
	@echo
	@echo "Look at:"
	@echo "  demo-out/compare.html     the comparison, in a browser"
	@echo "  demo-out/llama2-7b.html   the one step: timeline, memory, inputs with their sources"
	@echo "  demo-out/llama2-7b.json   the same step as a trace: open it at https://ui.perfetto.dev"
	@echo "Go on with: $(DEMO)/bin/rtp-sim --help"

test: lint types browser pytest

lint: $(TEST)/installed
	@$(TEST)/bin/ruff check .

types: $(TEST)/installed
	@$(TEST)/bin/mypy

# Files are dealt out to two processes; what measures times comes afterwards, by itself.
pytest: $(TEST)/installed
	@$(TEST)/bin/pytest -n 2 --dist loadfile -m "not alone"
	@$(TEST)/bin/pytest -m alone

# The report is tested in a real browser; where there is none, Debian's package is installed if that is allowed.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	    as_root=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
	    command -v apt-get >/dev/null && echo "installing chromium for the tests of the report (once)" && \
	    $$as_root apt-get update -qq && $$as_root apt-get install -y -qq --no-install-recommends chromium >/dev/null || \
	    echo "no Chromium or Chrome: the tests of the report will fail until one is installed" >&2

benchmarks: $(DEMO)/installed
	@$(DEMO)/bin/python benchmarks/compare_time.py
	@$(DEMO)/bin/python benchmarks/scale.py
	@$(DEMO)/bin/python benchmarks/unfolded64.py
	@$(DEMO)/bin/python benchmarks/estimate.py
	@$(DEMO)/bin/python benchmarks/parts.py

# Core dependencies only: what a user of the simulator needs.
$(DEMO)/installed: pyproject.toml
	@$(call environment,$(DEMO))
	@$(DEMO)/bin/python $(PIP) --editable .
	@touch $@

$(TEST)/installed: pyproject.toml constraints.txt
	@$(call environment,$(TEST))
	@$(TEST)/bin/python $(PIP) --constraint constraints.txt --editable ".[dev,torch]"
	@touch $@

# A virtual environment that git ignores, or one line about the Python it needs.
define environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
    { echo "$(PYTHON) is older than Python 3.11: give a newer one, for example make PYTHON=python3.12" >&2; exit 1; }; \
echo "setting up $(1) (once)"; $(PYTHON) -m venv $(1) && echo '*' > $(1)/.gitignore
endef

clean:
	@rm -rf $(DEMO) $(TEST) demo-out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
