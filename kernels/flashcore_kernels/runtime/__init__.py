"""From Python to a launch: compiled kernels, calls like one before, workspaces, Triton's interpreter."""
