"""Define the contracts between the core and its plugins: one Protocol per file, and the data that
it exchanges."""
