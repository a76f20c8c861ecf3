import sys
import types

sys.modules["__main__"] = types.ModuleType("other")
print("end")
