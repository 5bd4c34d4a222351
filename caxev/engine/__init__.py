"""The listener: it follows the stream, records reactions, runs them and settles them."""
