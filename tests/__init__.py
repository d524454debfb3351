"""A package, because some installed distributions bring a package of this name, which would otherwise come first."""
