"""The backbone of s3.1.3 on megatron-core."""
