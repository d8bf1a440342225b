"""Parts of `sweep_architectures.py`: which classes there are, how small ones are built, and what is compared."""
