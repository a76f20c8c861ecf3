import io
import sys

sys.stdout = io.StringIO()
print("nowhere")
sys.stderr.write("left\n")
