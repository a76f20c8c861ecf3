import tempfile

print(tempfile.gettempdir(), tempfile.tempdir)
