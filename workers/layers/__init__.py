"""What the model families are put together from, beside `loraplex.kernels`."""
