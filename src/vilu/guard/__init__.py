"""From an image to an answer with a decision: in Python, for transformers, as an ONNX graph."""
