# Two commands on a fresh machine do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# LOCKED=1 installs exactly what requirements.lock names, in files whose hashes stand there: by uv, which takes half of
# pip's time, and where that cannot be had or fails by pip.
by_uv = $(BIN)/python -m pip install --quiet uv && \
	$(BIN)/uv pip install --quiet --no-cache --compile-bytecode --python $(BIN)/python $(locked)
locked = --require-hashes -r requirements.lock
install = $(if $(LOCKED),($(by_uv)) ||,) $(BIN)/python -m pip install --quiet $(if $(LOCKED),$(locked),-r $(1))

# A process for each core. Each takes tests in their order, so that what a file's tests share is made once or twice.
IN_PARALLEL = -n auto --dist worksteal

.PHONY: demo app test quick long soak bench count gpu-check reproduce-smoke lint types audit lock format architecture clean

demo: $(VENV)/demo-installed
	$(BIN)/python src/demo.py

# The page names experts by what visualize.py wrote beside their weights.
demo_clip = $$(ls -d demo/models/Triplets_clip/* | tail -1)
demo_moe = $$(ls -d demo/models/Triplets_moe/*/seed_0 | tail -1)
app: $(VENV)/app-installed $(VENV)/demo-installed
	test -d demo/submission || $(BIN)/python src/demo.py
	$(BIN)/python src/search.py index --images demo/data/triplets_dataset/images --output demo/index \
		--clip-model-path $(demo_clip)
	test -f $(demo_moe)/experts.json || $(BIN)/python src/visualize.py --dataset Triplets --data-root demo/data \
		--combining-function combiner --clip-model-path $(demo_clip) --combiner-path $(demo_moe) \
		--feature-cache demo/features --output-dir $(demo_moe)
	$(BIN)/python src/demo_app.py --index demo/index --combiner-path $(demo_moe) \
		--examples demo/data/triplets_dataset/val.jsonl

test: $(VENV)/dev-installed
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not long" tests

# In one process, since loading the packages in a second one takes as long as a fifth of these tests. Left out are files
# about what stands around training and evaluation, and about machines.
around = audit backbones browser changed_images check_dataset data_utils distributed emoji_dataset export \
	exported_backbones gpu_check large_index last_net light_start lora milvus moved page_server plan resume search \
	stored trackers wrong_numbers
quick: $(VENV)/dev-installed
	$(BIN)/python -m pytest -m "not slow and not long" $(around:%=--ignore=tests/test_%.py) tests

# Dry runs of whole programs, whose parts `make test` tests. CI runs both.
long: $(VENV)/dev-installed
	$(BIN)/python -m pytest $(IN_PARALLEL) -m long tests

# All cases of every file that `make test` tries one of each kind of.
soak: $(VENV)/dev-installed
	SOAK=1 $(BIN)/python -m pytest $(IN_PARALLEL) $$(grep -lE "SOAK|one_of_each_kind" tests/test_*.py)

bench: $(VENV)/app-installed
	$(BIN)/python bench/run.py

# What steps would take on a GPU, counted without one.
count: $(VENV)/runtime-installed
	$(BIN)/python bench/null_gpu.py

# No packages are installed for it: a machine with a GPU is often without a network. It needs torch, torchvision, numpy,
# pillow and the clip package. REHEARSE=1 runs all of it on the CPU, as small as it goes; OUTPUT=FILE takes the results.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(if $(REHEARSE),--rehearse) $(if $(OUTPUT),--output $(OUTPUT))

# Every command of reproduce/*.sh on synthetic data with a tiny CLIP.
reproduce-smoke: $(VENV)/dev-installed
	rm -rf demo/reproduced
	for script in cirr fashioniq; do \
		SMOKE=1 OUT=demo/reproduced PYTHON=$(abspath $(BIN))/python bash reproduce/$$script.sh || exit 1; \
	done

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev-installed
	$(BIN)/mypy

# Asks PyPI whether faults are known of the locked versions; where it cannot be asked, that is an error and no "none".
audit: | $(BIN)/python
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r requirements.lock || \
		(echo "audit: a fault is known of a version above, or PyPI's advisories could not be reached" >&2; exit 1)

# Newer versions for all that is locked; then run the tests, and say it in the CHANGELOG.
lock: | $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	head -4 requirements.lock > $(VENV)/lock
	$(BIN)/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-unknown-linux-gnu --generate-hashes \
		--no-header --no-annotate requirements-dev.txt >> $(VENV)/lock
	mv $(VENV)/lock requirements.lock

format: $(VENV)/dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

architecture:
	$(PYTHON) docs/internals/architecture.py

clean:
	rm -rf $(VENV) demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime-installed: requirements.txt | $(BIN)/python
	$(call install,requirements.txt)
	touch $@

$(VENV)/app-installed: requirements-app.txt $(VENV)/runtime-installed
	$(call install,requirements-app.txt)
	touch $@

$(VENV)/demo-installed: requirements-demo.txt $(VENV)/runtime-installed
	$(call install,requirements-demo.txt)
	touch $@

$(VENV)/dev-installed: requirements-dev.txt $(VENV)/app-installed
	$(call install,requirements-dev.txt)
	touch $@
