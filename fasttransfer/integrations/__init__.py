"""Callbacks and trainers for other libraries. Each module needs its library, and says which extra installs it."""
