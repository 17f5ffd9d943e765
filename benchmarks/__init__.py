"""Benchmarks of fasttransfer against the code people write today."""
