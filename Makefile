# In an environment with `pip install -e ".[test]"`.
.PHONY: quality style test docs dist

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

# The site in build/docs, notebooks executed. It makes its environment where there is none: one command in a clean clone.
docs:
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -c "import furo, myst_nb" 2>/dev/null || \
		{ echo "Installing what the site needs into .venv, which takes minutes." && .venv/bin/pip install -e ".[docs]"; }
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python -m sphinx -c docs/site -b html -W --keep-going . build/docs

# What a release uploads, see CONTRIBUTING.md.
dist:
	python -m pip install --quiet build twine
	python -m build
	python -m twine check --strict dist/*
