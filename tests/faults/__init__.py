"""Fault campaigns: break a small collaboration, and compare its end with what should be.

`python -m tests.faults NAME`; each campaign is a module here, and has a short form in the suite.
"""
