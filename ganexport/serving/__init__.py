"""Serving an artifact over HTTP: a gateway that admits and answers, Ray Serve replicas that generate."""
