"""The three ways things end badly that a caller may want to tell apart."""


class CheckpointError(ValueError):
    """A file cannot be used as asked: names the file, what it looks like and what to do."""


class NumericalError(ArithmeticError):
    """A stage produced NaN or infinity: names the stage and what to do."""


class OutOfMemory(MemoryError):
    """A stage does not fit into the memory there is: names the stage and what to do."""
