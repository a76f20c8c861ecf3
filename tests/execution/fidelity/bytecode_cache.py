import os
import sys

open("freshly_written.py", "w").write("VALUE = 1\n")
sys.path.insert(0, os.getcwd())
import freshly_written

print(freshly_written.VALUE, os.listdir("__pycache__"))
