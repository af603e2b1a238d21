"""Ops: one file an op, the plain reference with its faster implementations."""
