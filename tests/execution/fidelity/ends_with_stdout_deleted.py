import sys

print("before")
del sys.stdout
