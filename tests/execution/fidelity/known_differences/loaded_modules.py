import sys

print("ctypes" in sys.modules)
