"""Megatron on CPU, before the first fork."""

from nemo_moviegen.training.cpu import stand_in_for_cuda

stand_in_for_cuda()
