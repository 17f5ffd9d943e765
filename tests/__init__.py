"""The test suite: `make test`, or `python -m pytest tests -k "kd and reference"`."""
