"""dra_ray: robust image classifiers with TRADES, synthetic images and Diffusion Representation
Alignment, on Ray.
"""

__version__ = "0.1.0"
