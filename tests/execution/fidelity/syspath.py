import sys

print(sys.path)
print(sys.path_hooks, [getattr(finder, "__name__", finder) for finder in sys.meta_path])
