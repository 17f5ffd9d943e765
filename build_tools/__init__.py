"""How fasttransfer is built: `probe` looks, `decide` chooses, `compile` does it, `weak_symbols` checks.

Part of the source distribution, never of the installed package. Only the standard library is imported at
module level, so that setup.py can explain what is missing in place of dying on an import.
"""
