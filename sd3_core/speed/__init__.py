"""What the rest works without: the same pictures for less, and on request nearly the same."""
