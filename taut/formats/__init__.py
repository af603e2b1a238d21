"""Number formats narrower than torch computes in: rounding to them, and their codes."""
