import atexit
import sys

atexit.register(sys.stdout.write, "written at exit")
