.PHONY: format lint type-check test bench demo

format:
	ruff format . && ruff check --fix .

lint:
	ruff format --check . && ruff check .

type-check:
	mypy

test:
	pytest

bench:
	pytest benchmarks --benchmark-only --benchmark-sort=name --benchmark-json=bench.json
	python -m benchmarks.guard bench.json benchmarks/baselines/cpu.json

demo:
	copynce demo
