"""Bit-level emulators of fixed-point units: what a chip would answer, and what it would cost."""
