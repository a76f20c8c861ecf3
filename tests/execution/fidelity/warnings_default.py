import warnings

warnings.warn("shown", UserWarning)
warnings.warn("deprecated in main", DeprecationWarning)
warnings.warn("pending", PendingDeprecationWarning)
warnings.warn("resource", ResourceWarning)
print([entry for entry in warnings.filters if "numpy" not in str(entry)])  # preloaded modules may add some
