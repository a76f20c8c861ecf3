import atexit

atexit.register(print, "at exit")
raise LookupError("in the script")
