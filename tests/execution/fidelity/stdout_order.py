import os
import sys

print("buffered")
sys.stderr.write("unbuffered\n")
os.write(1, b"raw\n")
print("no newline", end="")
