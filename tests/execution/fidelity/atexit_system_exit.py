import atexit
import sys


def leave():
    sys.exit(9)


atexit.register(leave)
print("end")
