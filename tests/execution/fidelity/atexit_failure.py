import atexit


def fail():
    raise ValueError("at exit")


atexit.register(print, "after the failure")
atexit.register(fail)
