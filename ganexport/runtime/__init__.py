"""Runners: one engine running one file of an artifact, without torch."""
