"""Examples of fasttransfer on real data: one script per transfer system, and the demo that runs them."""
