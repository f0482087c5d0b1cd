"""From scores and labels to a probability, a rule with a guarantee, and whether it still holds."""
