"""Text in, text out: everything between a user's words and the engine's token ids. Lives in the
front-end alone."""
