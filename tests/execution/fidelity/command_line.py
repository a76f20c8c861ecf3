import sys

print(open("/proc/self/cmdline", "rb").read().split(b"\0"))
print(open("/proc/self/comm").read(), sys.argv)
