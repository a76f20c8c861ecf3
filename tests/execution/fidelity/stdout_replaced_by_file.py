import sys

sys.stdout = open("output.txt", "w")
print("into the file, never flushed")
