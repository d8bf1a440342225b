"""Parts of `sweep_architectures.py`: which classes there are, how small ones are built, and what is compared."""

TOLERANCE = 2e-5  # of the largest output, fp32
CONTROL = 100 * TOLERANCE  # a scale that is wrong by half must show at least this much
