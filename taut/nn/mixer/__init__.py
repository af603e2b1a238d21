"""Token mixers: modules through which tokens see one another."""
