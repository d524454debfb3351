"""What is made from ONNX without torch: rewrites, precisions, engines."""
