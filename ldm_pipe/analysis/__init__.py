"""Closed-form denoisers: what a perfect network would say, for judging samplers without one."""
