import os

for name in sorted(os.environ):
    print(name, "=", os.environ[name])
print(len(os.environ), os.environb[b"FIDELITY"], os.getenv("NOT_THERE"))
