import sys


def hook(kind, error, trace):
    sys.exit(17)


sys.excepthook = hook
raise ValueError("the original")
