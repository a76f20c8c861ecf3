import atexit

atexit.register(print, "registered first")
atexit.register(print, "registered last", end="!\n")
print("end of script")
