"""Looking into a generator: walks between latents, truncation sweeps, classes, nearest training images."""
