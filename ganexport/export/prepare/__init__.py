"""Named passes that make a module exportable."""
