"""From an image to an answer with a decision: in Python, in a transformers pipeline, as an ONNX graph."""
