import sys

value = eval(sys.argv[1])
print("exits with", value)
sys.exit(value)
