"""A predictor leaves this machine: as a graph for other runtimes, or as a folder on a model hub."""
