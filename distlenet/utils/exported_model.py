"""What the export and the server of a model agree on."""

MODEL_FORMAT = 1  # of model.json
INT8 = "model.int8.onnx"
