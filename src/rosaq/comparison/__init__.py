"""Many recipes over one model, each quantized and evaluated once, in one table (ROSAQ Table 5, arXiv:2506.13472)."""
