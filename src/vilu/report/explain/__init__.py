"""Why an answer is suspicious, and where the failures of a set are."""
