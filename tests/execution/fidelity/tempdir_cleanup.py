import os
import tempfile

directory = tempfile.TemporaryDirectory(dir=".")
open(os.path.join(directory.name, "file"), "w").close()
print(len(os.listdir(".")), flush=True)
