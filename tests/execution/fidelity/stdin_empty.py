import sys

print(repr(sys.stdin.read()))
try:
    input()
except EOFError as error:
    print(repr(error))
