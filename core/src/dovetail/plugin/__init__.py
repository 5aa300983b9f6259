"""What a plugin's author reads: providers, hooks, extension points, contract versions, discovery
and config."""
