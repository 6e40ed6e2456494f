"""What turns a model without computed weights into an artefact: ONNX files, TensorRT engines, PyTorch programs."""
