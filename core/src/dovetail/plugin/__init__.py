"""Define what a plugin author uses: providers, hooks, extension points, contract versions,
discovery and config."""
