kept = open("text.txt", "w")
kept.write("written, never closed")
binary = open("binary.bin", "wb")
binary.write(b"also")
