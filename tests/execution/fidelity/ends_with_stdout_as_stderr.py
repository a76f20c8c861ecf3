import sys

sys.stdout.write("first\n")
sys.stdout = sys.stderr
print("second")
