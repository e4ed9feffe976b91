"""Choosing attention sites, replacing and restoring them, and files that hold the result."""
