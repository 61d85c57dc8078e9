"""The CUDA driver on a torch.cuda and a libcuda of Python threads."""
