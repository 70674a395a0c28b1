"""The CUDA kernels of the operations: `cuda/` holds their sources, this room packs, loads and calls them."""
