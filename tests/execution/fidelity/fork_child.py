import os
import sys

print("before")
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    print("child")
else:
    print("parent", os.waitpid(pid, 0)[1])
