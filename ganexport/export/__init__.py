"""From a torch module to an artifact."""
