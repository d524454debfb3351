"""Run candidates fairly: a process each, one active at a time."""
