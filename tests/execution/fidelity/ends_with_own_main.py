import sys

sys.modules["__main__"] = sys
print("replaced")
