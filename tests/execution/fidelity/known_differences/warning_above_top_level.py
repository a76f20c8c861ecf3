import warnings

warnings.warn("attributed to the caller", stacklevel=2)
