"""Spacings that have a paper of their own: functions (path, steps) -> levels, one a file. The usual ones are in `levels.py`."""
