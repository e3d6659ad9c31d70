# In an environment with `pip install -e ".[test]"`.
.PHONY: quality style test

# What a change must pass, but for the tests.
quality:
	ruff check .
	ruff format --check .
	mypy hf_fedmoe

# Mends what can be mended.
style:
	ruff check --fix .
	ruff format .

test:
	OMP_NUM_THREADS=1 python -m pytest -n 2
