"""Why an answer is suspicious, and where the failures of a data set are; from embeddings alone."""
