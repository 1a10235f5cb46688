"""Movie Gen (arXiv 2410.13720) on megatron-core: plain numbers at the top, ranks at the bottom."""

__version__ = "0.1.0"
