"""Decisions about copies: which of them agree, which share files, and which may be deleted."""
