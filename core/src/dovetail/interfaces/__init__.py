"""The contracts between the core and its plugins: one Protocol a file, and the data that crosses
it."""
