# The handful of commands. Each works without make: copy the line.
.PHONY: install check fast test slow demo zoo

install:  ## dependencies, into the active virtual environment
	python -m pip install -r requirements.txt -r requirements-dev.txt

check:  ## exactly what CI runs, in a virtual environment of its own
	.ci/run

fast:  ## one module's tests: make fast M=stack
	python -m pytest tests/test_$(M).py

test:  ## the default tests
	python -m pytest

slow:  ## the tests over 5 s
	python -m pytest -m slow

demo:  ## merge the embedded experts and answer data/test.csv
	python llm_merging/main.py

zoo:  ## train base and experts anew into build/new (minutes, one CUDA GPU)
	python -m benchmarks.zoo --out build/new/zoo --work build/new/work --queries build/new
