import sys

print(sys.executable, sys.prefix, sys.base_prefix, sys.version, sys.flags, sys.warnoptions, sys._xoptions)
print(sys.getrecursionlimit(), sys.getswitchinterval(), sys.dont_write_bytecode, sys.pycache_prefix)
print(sys.gettrace(), sys.getprofile(), sys.flags.safe_path, hasattr(sys, "ps1"), hasattr(sys, "last_type"))
