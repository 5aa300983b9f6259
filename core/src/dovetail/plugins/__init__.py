"""Finding plugins, asking them for providers, and choosing among those."""
