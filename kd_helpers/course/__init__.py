"""The notebooks' side of the package: running, storing and publishing them, their figures, explorers and exercises."""
