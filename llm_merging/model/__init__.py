"""What a decoder model answers to a batch of queries."""
