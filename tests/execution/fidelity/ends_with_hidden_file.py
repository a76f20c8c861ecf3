import sys

sys.hidden = open("left_open.txt", "w")
sys.hidden.write("buffered")
