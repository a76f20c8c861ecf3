import os

old = os.umask(0o077)
print(oct(old), os.getcwd())
os.umask(old)
open("created", "w").close()
print(oct(os.stat("created").st_mode))
