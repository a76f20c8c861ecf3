import subprocess
import sys

print(subprocess.check_output([sys.executable, "-c", "import sys; print(sys.argv, sys.flags)"], text=True))
subprocess.run(["sh", "-c", "echo to stdout; echo to stderr >&2; kill -9 $$"], check=True)
