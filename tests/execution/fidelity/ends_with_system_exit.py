import sys

value = 1
print("left early")
sys.exit(3)
