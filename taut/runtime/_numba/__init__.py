"""The interpreter of decode programs: one compiled function, for which every model is data."""
