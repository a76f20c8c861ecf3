import sys
import traceback


def hook(kind, error, trace):
    print("hook", kind.__name__, error, [frame.name for frame in traceback.extract_tb(trace)])
    print(sys.last_type, sys.last_value, error.__context__)


sys.excepthook = hook
raise ValueError("for the hook")
