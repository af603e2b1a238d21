"""Plain torch modules for people who build models."""
