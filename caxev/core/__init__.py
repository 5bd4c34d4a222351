"""The pure core: what caxev decides, without I/O; its contract forbids trio, pymongo, os and time.

Everything else builds on it. Times are arguments (UTC), apart from `clock`.
"""
