import gc
import sys

gc.freeze()
sys.hidden = open("left_open.txt", "w")
sys.hidden.write("buffered")
