import gc

file = open("left_open.txt", "w")
file.write("buffered")
gc.freeze()
