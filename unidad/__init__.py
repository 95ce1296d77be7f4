"""unidad: about ten pictures and a diffusion model in, a generator of that domain that draws in 1 to 4 steps out."""

__version__ = "0.1.0"
