import atexit

atexit.register(int, "not a number")
