"""Hypothesis without deadlines: a first call loads libraries, and machines are shared."""

from hypothesis import settings

settings.register_profile("kernels", deadline=None)
settings.load_profile("kernels")
