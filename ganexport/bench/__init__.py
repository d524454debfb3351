"""Scenarios, candidates and reports."""
