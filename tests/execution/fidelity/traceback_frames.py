import sys
import traceback


def fail():
    raise ValueError("seen from inside")


try:
    fail()
except ValueError:
    traceback.print_exc(file=sys.stdout)
    print([frame.name for frame in traceback.extract_tb(sys.exc_info()[2])])
print(sys.exc_info())
