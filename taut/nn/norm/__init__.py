"""Normalisations as plain torch modules, drop-in where torch has one.

One file each, found by listing the folder. Beside its module a file has `cases(make)`, which yields pairs (module,
inputs) for the contract tests; `make(*shape)` gives a random tensor. A module whose backward is by design not the
derivative of its forward says so with `exact_gradient = False`.
"""
