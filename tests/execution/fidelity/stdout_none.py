import sys

print("before")
sys.stdout = None
print("dropped")
raise SystemExit("why")
