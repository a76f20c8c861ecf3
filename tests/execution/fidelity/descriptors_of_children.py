import os
import subprocess

subprocess.run(["/bin/sh", "-c", "ls /proc/self/fd | head -n 3"], close_fds=False)
print(os.dup(0))
