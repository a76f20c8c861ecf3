import sys


def hook(unraisable):
    print("unraisable", unraisable.exc_type.__name__, unraisable.exc_value)


class Bad:
    def __del__(self):
        raise ValueError("in __del__")


sys.unraisablehook = hook
bad = Bad()
del bad
