"""Many images at once: encoded, in shards, resumable after any interruption."""
