"""Frozen diffusion encoders: the network, its training maths, its checkpoints, and the protocol
that serves features.
"""
