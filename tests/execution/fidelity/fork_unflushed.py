import os

print("twice, as the buffer is copied")
pid = os.fork()
if pid:
    os.waitpid(pid, 0)
