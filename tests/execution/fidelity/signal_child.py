import signal
import subprocess
import sys

print(signal.getsignal(signal.SIGCHLD), subprocess.run([sys.executable, "-c", "exit(3)"]).returncode)
