# make test                          set up .venv, then run every test and the smoke reproduction
# make reproduce [PROFILE=laptop]    set up .venv, then run the numbered notebooks
PROFILE ?= laptop
PYTHON  ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,13))' 2>/dev/null && { echo $$p; break; }; done)
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
BIN   := .venv/bin
READY := .venv/.ready

.PHONY: test reproduce setup
setup: $(READY)

test: $(READY)
	$(BIN)/nbdev-test --skip-folder-re '^([_.]|repro)' --n-workers 2
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/webseer reproduce --profile smoke

reproduce: $(READY)
	$(BIN)/webseer reproduce --profile $(PROFILE)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "webseer needs Python 3.11 or 3.12: install one, or name it with make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -c "import urllib.request as u; u.urlopen('$(CPU_TORCH)/torch/', timeout=10)" 2>/dev/null && index="--extra-index-url $(CPU_TORCH)"; \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $$index -c constraints.txt -e '.[train,dev]'
	touch $@
