"""Rewrites: one file a rewrite. Found by listing this folder."""
