"""Scores of the zero-shot logits alone: nothing is learned."""
