import signal

# 32 and 33 are the C library's own.
for line in open("/proc/self/status"):
    name, _, value = line.partition(":")
    if name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"):
        numbers = {number for number in range(1, 65) if int(value, 16) >> (number - 1) & 1}
        print(name, sorted(numbers - {32, 33, signal.SIGRTMAX - 1}))
