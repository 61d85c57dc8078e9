"""What is on disk: kinds of model files, their headers, their tensors by row range, and what they say of the model."""
