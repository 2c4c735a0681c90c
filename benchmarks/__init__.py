"""Questions answered by scripts; nothing here is imported by the method."""
