"""From scores to decisions: accept or abstain with a stated risk, label sets, and whether the promise still holds."""
