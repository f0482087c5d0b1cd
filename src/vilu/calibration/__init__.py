"""From scores and labels to a probability and a rule with a guarantee, and whether it still holds."""
