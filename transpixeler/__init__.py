"""Train a video diffusion transformer to generate several aligned videos at once."""

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here
