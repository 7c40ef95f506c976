# make demo   set up and run the main job: images in one call, two distillations, pictures, a report
# make test   set up and run the tests; make test-fast leaves out those that take seconds each
# make docs   set up and build the site; make docs-serve shows it
# make package   wheel and sdist into dist/, tried in an environment of their own
#
# Each makes .venv with the CPU build of torch, pinned, so that a machine without a GPU never downloads CUDA.
# For a GPU:  make demo TORCH=torch==2.13.0

PYTHON ?= python3
TORCH ?= $(if $(filter Darwin,$(shell uname -s)),torch==2.13.0,torch==2.13.0+cpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP = .venv/bin/python -m pip --disable-pip-version-check
READY = .venv/.ready-$(subst /,-,$(TORCH))

.PHONY: demo test test-fast package lint leaderboard figures docs docs-serve clean

demo: $(READY)
	mkdir -p runs
	.venv/bin/fewstep sample fewstep:fashion-mnist-fast --steps 1 --count 64 --out runs/one-call.png
	.venv/bin/fewstep distill checkerboard-itvm --out runs/checkerboard
	.venv/bin/fewstep distill fashion-mnist-demo --out runs/fashion-mnist-demo
	@echo
	@echo "One call each:  runs/one-call.png, by the student that fewstep carries;"
	@echo "the table above: the new student in 2 calls against its teacher in 8;"
	@echo "the pictures: runs/checkerboard/samples and runs/fashion-mnist-demo/samples, one each eighth of the training;"
	@echo "the reports:  runs/checkerboard/report.html and runs/fashion-mnist-demo/report.html"

# Two processes take 2 GB of memory together. make test WORKERS=8 on a larger machine
WORKERS ?= 2
PYTEST = .venv/bin/python -m pytest -n $(WORKERS) --dist worksteal

test: $(READY)
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m "not slow and not takes_seconds"

package: $(READY)
	.venv/bin/python tests/toys/packaged.py

lint: $(READY)
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/lint-imports && .venv/bin/pyright

# benchmarks/LEADERBOARD.md, from benchmarks/results
leaderboard: $(READY)
	.venv/bin/python benchmarks/leaderboard.py

# Every figure of README and docs against benchmarks/results
figures: $(READY)
	.venv/bin/python benchmarks/figures.py

# The site, into docs/_build/html: offline, every warning an error
docs: $(READY)-docs
	rm -rf docs/_build
	.venv/bin/python -m sphinx --nitpicky --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html is the site; make docs-serve shows it"

# The site at http://127.0.0.1:8000, for this machine alone
docs-serve: docs
	.venv/bin/python -m http.server --bind 127.0.0.1 --directory docs/_build/html $(or $(PORT),8000)

$(READY)-docs: $(READY)
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	touch $@

# torch first: any package that asks for "torch" is then content with what is there.
# The indexes pip knows come first; torch's own only where they do not have the CPU build.
$(READY): pyproject.toml constraints.txt Makefile
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install -q "$(TORCH)" || $(PIP) install -q "$(TORCH)" --extra-index-url $(TORCH_INDEX)
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	rm -f .venv/.ready-* && touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info
