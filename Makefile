# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
# Files of tests at a time. Real runs mostly wait, so two take half as long as one; 0 is one, in the order of their names.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test soak bench picture recording docs setup clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Midwatch needs Python 3.11 or newer (PYTHON=python3.12 make ...)"; exit 2; }
	@echo "setting up $(VENV) (once; about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,data,executors,test]'
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	@$(BIN)/midwatch run recipes/demo.toml

test: $(STAMP)
	@sh tests/setup.sh
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

soak: $(STAMP)
	@sh tests/setup.sh
	@sh tests/vllm.sh
	@$(BIN)/python -m pytest -m soak --timeout=3600

bench: $(STAMP)
	@$(BIN)/python -m bench

picture: $(STAMP)
	@$(BIN)/python -m docs.picture

recording: $(STAMP)
	@$(BIN)/python -m docs.recording

$(VENV)/.docs: pyproject.toml constraints.txt | $(STAMP)
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(if $(SERVE),serve,build)

clean:
	rm -rf $(VENV) .venv-vllm build dist site *.egg-info
