"""Ours against the best of what else there is, in one run on the same work. Run as modules from the source tree."""
