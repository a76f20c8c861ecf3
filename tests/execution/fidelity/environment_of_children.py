import os
import subprocess

os.environ["SET_BY_SCRIPT"] = "1"
print(sorted(subprocess.run(["env"], capture_output=True, text=True).stdout.splitlines()))
