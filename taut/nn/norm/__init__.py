"""Normalisations as plain torch modules, drop-in where torch has one."""
