import os
import sys

sys.stdout.flush()
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(writer, b"daemon")
    os._exit(0)
os.wait()
print(os.read(reader, 10), os.getppid() > 0)
